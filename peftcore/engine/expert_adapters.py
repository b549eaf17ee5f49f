"""Adapters of single experts (`experts.3.down_proj`), joined into one adapter of the module of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from peftcore.errors import PeftcoreError
from peftcore.model.experts import EachExpert, experts_layout
from peftcore.plugin.adapter import Adapter
from peftcore.plugin.call import arguments_read
from peftcore.plugin.link import Link
from peftcore.plugin.placements.on_weight import WeightChanges, WeightLink


class OfExpert(NamedTuple):
    """Adapter of one expert's layer: its path, the name of the stacked weight, the number of the expert."""

    path: str
    name: str
    expert: int
    adapter: nn.Module
    link: type[Link]
    branches: Sequence[str]


class ExpertLink(WeightLink):
    """The link of `WeightChanges` that consist of one `EachExpert` for each weight."""

    __slots__ = ()
    merges_by = "merged"

    @classmethod
    def is_mergeable(cls, adapter: nn.Module) -> bool:
        return all(change.is_mergeable() for change in cls.changes_of(adapter).values())

    @staticmethod
    def merged_change(change: Any, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        found: tuple[Tensor, Tensor | None] = change.merged(weight, bias)
        return found


def each_expert(model: nn.Module, method: str, path: str, adapters: Sequence[OfExpert]) -> WeightChanges:
    """Return the adapter of the module of experts at `path`: one for each expert of each of its weights.

    Raises:
        PeftcoreError: some experts of a weight have none, or an adapter must know which sample a row belongs to.
    """
    layout: Any = experts_layout(model.get_submodule(path))
    by_name: dict[str, dict[int, OfExpert]] = {}
    for each in adapters:
        _refuse_unfit(method, path, each)
        if each.expert in by_name.setdefault(each.name, {}):
            raise PeftcoreError(
                f"{method} places two adapters at '{each.path}'; a module takes one adapter of each name"
            )
        by_name[each.name][each.expert] = each
    changes: dict[str, nn.Module] = {}
    for name in (name for name in layout.names if name in by_name):
        own = by_name[name]
        lacking = next((expert for expert in range(layout.count) if expert not in own), None)
        if lacking is not None:
            raise PeftcoreError(
                f"{method} places adapters at experts of '{path}.{name}', and none at expert {lacking}. All have "
                "one, or none"
            )
        changes[name] = EachExpert([own[i].adapter for i in range(layout.count)], layout.transposed, own[0].link)
    return WeightChanges(changes)


def _refuse_unfit(method: str, path: str, each: OfExpert) -> None:
    """Raise a PeftcoreError if the adapter reads the call, mixes the rows of a call, or combines others."""
    asks = arguments_read([each.adapter]) is not None
    whole = any(part.whole_batch for part in each.adapter.modules() if isinstance(part, Adapter))
    if asks or whole or each.branches:
        why = "reads the call of the model" if asks else "mixes the rows of a call" if whole else "combines others"
        raise PeftcoreError(
            f"{method} {why}, but the experts of '{path}' do not know which sample a row belongs to. Leave them out of "
            "target_modules"
        )
