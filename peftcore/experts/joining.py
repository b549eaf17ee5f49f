"""Adapters of single experts (`experts.3.down_proj`), joined into one adapter of the module of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from peftcore.adaptation.call import asked
from peftcore.adaptation.chain import WeightChanges
from peftcore.adapter import Adapter
from peftcore.errors import PeftcoreError
from peftcore.experts import EachExpert, experts_layout, split_expert_path
from peftcore.method import After, Around


def each_expert(model: nn.Module, method: str, path: str, placements: Sequence[Around | After]) -> WeightChanges:
    """Return the adapter of the module of experts at `path`: one for each expert of each of its weights.

    Raises:
        PeftcoreError: some experts of a weight have none, or an adapter must know which sample a row belongs to.
    """
    layout: Any = experts_layout(model.get_submodule(path))
    by_name: dict[str, dict[int, Around | After]] = {}
    for placement in placements:
        _refuse_unfit(method, path, placement)
        _, name, expert = split_expert_path(model, placement.path) or ("", "", 0)
        if expert in by_name.setdefault(name, {}):
            raise PeftcoreError(
                f"{method} places two adapters at '{placement.path}'; a module takes one adapter of each name"
            )
        by_name[name][expert] = placement
    changes: dict[str, nn.Module] = {}
    for name in (name for name in layout.names if name in by_name):
        own = by_name[name]
        lacking = next((expert for expert in range(layout.count) if expert not in own), None)
        if lacking is not None:
            raise PeftcoreError(
                f"{method} places adapters at experts of '{path}.{name}', and none at expert {lacking}. All have "
                "one, or none"
            )
        behind = isinstance(own[0], After)
        changes[name] = EachExpert([own[i].adapter for i in range(layout.count)], layout.transposed, behind)
    return WeightChanges(changes)


def weight_of_expert(path: str, placement: Any) -> str | None:
    """Return the full name of the stacked weight if `placement` is at one of its experts, else None."""
    own = getattr(placement, "path", path)
    return f"{path}.{own.rpartition('.')[2]}" if own != path else None


def one_by_one(placements: Mapping[str, Sequence[Any]]) -> bool:
    """Return whether some of the placements, by the path of their module, are at single experts."""
    return any(weight_of_expert(path, each) is not None for path, placed in placements.items() for each in placed)


def _refuse_unfit(method: str, path: str, placement: Around | After) -> None:
    """Raise a PeftcoreError if the adapter reads the call, mixes the rows of a call, or combines others."""
    asks = asked([placement.adapter]) is not None
    whole = any(each.whole_batch for each in placement.adapter.modules() if isinstance(each, Adapter))
    branches = isinstance(placement, Around) and placement.branches
    if asks or whole or branches:
        why = "reads the call of the model" if asks else "mixes the rows of a call" if whole else "combines others"
        raise PeftcoreError(
            f"{method} {why}, but the experts of '{path}' do not know which sample a row belongs to. Leave them out of "
            "target_modules"
        )
