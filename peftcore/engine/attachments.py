"""What a method attaches to a model: adapters of modules, and trained parameters of the base.

Adapters of several parameters, or of single experts (`experts.3.down_proj`), are joined into one adapter of the module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from peftcore.engine.prompts.backbone import checked_shape
from peftcore.engine.prompts.prefix import place_prefix
from peftcore.engine.prompts.soft_prompt import place_soft_prompt
from peftcore.errors import PeftcoreError, nearest
from peftcore.model.base_modules import base_modules, base_parameters
from peftcore.model.experts import EachExpert, experts_layout, split_expert_path
from peftcore.model.weight_formats import quantized_format
from peftcore.plugin.adapter import Adapter
from peftcore.plugin.architecture import Architecture
from peftcore.plugin.call import arguments_read
from peftcore.plugin.link import Link
from peftcore.plugin.method import Method
from peftcore.plugin.placements.on_weight import WeightChanges, WeightLink
from peftcore.plugin.placements.placement import Placement


@dataclass(frozen=True)
class OfExpert:
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
    if arguments_read([each.adapter]) is not None:
        reason = "reads the call of the model"
    elif any(part.whole_batch for part in each.adapter.modules() if isinstance(part, Adapter)):
        reason = "mixes the rows of a call"
    elif each.branches:
        reason = "combines others"
    else:
        return
    raise PeftcoreError(
        f"{method} {reason}, but the experts of '{path}' do not know which sample a row belongs to. Leave them out of "
        "target_modules"
    )


_PREFIX = ("layers", "2", "kv_heads", "tokens", "head_dim")


@dataclass(frozen=True, slots=True)
class Attachment:
    """One adapter as it is attached to a module.

    Args:
        path: path of the module.
        adapter: the adapter that is attached, which may consist of several.
        placements: what the method placed.
        link: how the adapter takes part in calls, and how it is merged.
        branches: names of other adapters of the module that it combines.
        parts: the adapters that it consists of.
    """

    path: str
    adapter: nn.Module
    placements: tuple[Placement, ...]
    link: type[Link] = Link
    branches: Sequence[str] = ()
    parts: tuple[nn.Module, ...] = ()


@dataclass
class AdapterAttachments:
    """What the placements of a method attach to `model`. Each `Placement.attach` adds to it, as the contract says.

    Args:
        model: the model, which is not changed.
        architecture: facts about it.
        method: the method.
        config: its config, with every choice explicit.
        attached: the adapters, one for each module.
        trained: names of trained parameters of the base.
        apart: those trained separately from the parameters they are tied to.
        names_modules: the config names modules, rather than all of a kind.
    """

    model: nn.Module
    architecture: Architecture
    method: Method
    config: Any = None
    attached: list[Attachment] = field(default_factory=list)
    trained: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    names_modules: bool = True
    _changes: dict[str, list[tuple[str, nn.Module, Placement]]] = field(default_factory=dict)
    _experts: dict[str, list[tuple[OfExpert, Placement]]] = field(default_factory=dict)

    def wrap(
        self,
        placement: Placement,
        path: str,
        adapter: nn.Module,
        link: type[Link] = Link,
        branches: Sequence[str] = (),
    ) -> None:
        expert_path = split_expert_path(self.model, path)
        if expert_path is None:
            self.attached.append(Attachment(path, adapter, (placement,), link, branches))
            return
        experts, name, number = expert_path
        of_expert = OfExpert(path=path, name=name, expert=number, adapter=adapter, link=link, branches=branches)
        self._experts.setdefault(experts, []).append((of_expert, placement))

    def change(self, placement: Placement, path: str, name: str, adapter: nn.Module) -> None:
        self._changes.setdefault(path, []).append((name, adapter, placement))

    def train(self, names: Sequence[str]) -> None:
        self.trained = tuple(dict.fromkeys([*self.trained, *names]))

    def prompt(self, placement: Placement, shape: tuple[int, int] | None) -> None:
        found = checked_shape(self.model, self.architecture, placement, ("tokens", "hidden"), shape)
        for path, adapter in place_soft_prompt(self.model, self.architecture, placement.adapter, *found):
            self.wrap(placement, path, adapter)

    def prefix(self, placement: Placement) -> None:
        found = checked_shape(self.model, self.architecture, placement, _PREFIX)
        for path, adapter in place_prefix(self.model, self.architecture, placement.adapter, found):
            self.wrap(placement, path, adapter)

    def join(self) -> None:
        """Make one adapter of those for several parameters or experts of a module, once all are declared."""
        for path, experts in self._experts.items():
            whole: nn.Module = each_expert(self.model, self.method.name, path, [each for each, _ in experts])
            placements = tuple(placement for _, placement in experts)
            parts = tuple(each.adapter for each, _ in experts)
            self.attached.append(Attachment(path, whole, placements, ExpertLink, parts=parts))
        for path, changes in self._changes.items():
            whole = _joined(self.model, self.method.name, path, [(name, adapter) for name, adapter, _ in changes])
            placements = tuple(placement for *_, placement in changes)
            parts = tuple(adapter for _, adapter, _ in changes)
            self.attached.append(Attachment(path, whole, placements, WeightLink, parts=parts))

    @property
    def placements(self) -> dict[str, tuple[Placement, ...]]:
        """What the method placed, by the path of the module that carries it."""
        return {each.path: each.placements for each in self.attached}

    @property
    def paths(self) -> list[str]:
        """Paths of the modules to which adapters are attached."""
        return [each.path for each in self.attached]


def _joined(model: nn.Module, method: str, path: str, changes: Sequence[tuple[str, nn.Module]]) -> WeightChanges:
    """Return one adapter for all parameters, (name, adapter), of the module at `path` that a method changes.

    Raises:
        PeftcoreError: the module or parameter does not exist, no format reads it, or two adapters are on one parameter.
    """
    modules = dict(base_modules(model))
    if path not in modules:
        raise PeftcoreError(f"{method} places an adapter at '{path}', which is not a module{nearest(path, modules)}")
    parameters = dict(base_parameters(modules[path]))
    for name, _ in changes:
        parameter, inside = parameters.get(name), name.rpartition(".")[0]
        if parameter is None:
            raise PeftcoreError(
                f"{method} changes the parameter '{name}' of '{path}', which has none of this name"
                f"{nearest(name, parameters)}"
            )
        is_read = not inside and quantized_format(modules[path], name) is not None
        if not is_read and not (parameter.is_floating_point() or parameter.is_complex()):
            raise PeftcoreError(
                f"{method} changes the parameter '{name}' of '{path}', which is stored as {parameter.dtype}: "
                "no weight format can decode. Leave that module dense, or exclude it"
            )
    names = [name for name, _ in changes]
    if len(set(names)) < len(names):
        raise PeftcoreError(f"{method} places two adapters on one parameter of '{path}': {sorted(names)}")
    return WeightChanges(dict(changes))
