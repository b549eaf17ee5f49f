"""Attachments of a method: one adapter per module, and the base parameters that the method trains.

Adapters of several parameters of a module, or of single experts (`experts.3.down_proj`), are joined into one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from peftcore.engine.prompts.backbone import checked_shape
from peftcore.engine.prompts.prefix import place_prefix
from peftcore.engine.prompts.soft_prompt import place_soft_prompt
from peftcore.errors import PeftcoreError, nearest
from peftcore.model.base_modules import base_modules, base_parameters
from peftcore.model.experts import ExpertAdapters, experts_layout, split_expert_path
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
    """Adapter of one expert's layer.

    Args:
        path: path of the layer, such as `experts.3.down_proj`.
        name: name of the stacked weight in the module of experts.
        expert: index of the expert.
    """

    path: str
    name: str
    expert: int
    adapter: nn.Module
    link: type[Link]
    branches: Sequence[str]


class ExpertLink(WeightLink):
    """Link of `WeightChanges` with one `ExpertAdapters` per weight."""

    __slots__ = ()
    merges_by = "merged"

    @classmethod
    def is_mergeable(cls, adapter: nn.Module) -> bool:
        return all(change.is_mergeable() for change in cls.changes_of(adapter).values())

    @staticmethod
    def merged_change(change: Any, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return cast("tuple[Tensor, Tensor | None]", change.merged(weight, bias))


def each_expert(model: nn.Module, method: str, path: str, adapters: Sequence[OfExpert]) -> WeightChanges:
    """Join the adapters of single experts into one adapter for the module of experts at `path`.

    Raises:
        PeftcoreError: some experts of a weight have no adapter, or an adapter needs to know the sample of each row.
    """
    layout = experts_layout(model.get_submodule(path))
    assert layout is not None
    by_name: dict[str, dict[int, OfExpert]] = {}
    for attachment in adapters:
        _refuse_unfit(method, path, attachment)
        if attachment.expert in by_name.setdefault(attachment.name, {}):
            raise PeftcoreError(
                f"{method} places two adapters on '{attachment.path}', but a module can have only one adapter per "
                "name. Combine them into one adapter"
            )
        by_name[attachment.name][attachment.expert] = attachment
    changes: dict[str, nn.Module] = {}
    for name in filter(by_name.__contains__, layout.names):
        by_expert = by_name[name]
        missing_expert = next((expert for expert in range(layout.count) if expert not in by_expert), None)
        if missing_expert is not None:
            raise PeftcoreError(
                f"{method} places adapters on experts of '{path}.{name}', but none on expert {missing_expert}. Place "
                "one on every expert or on none"
            )
        changes[name] = ExpertAdapters(
            [by_expert[i].adapter for i in range(layout.count)], layout.transposed, by_expert[0].link
        )
    return WeightChanges(changes)


def _refuse_unfit(method: str, path: str, attachment: OfExpert) -> None:
    """Raise a PeftcoreError if the adapter reads the call, mixes the rows of a call, or combines other adapters."""
    if arguments_read([attachment.adapter]) is not None:
        reason = "reads the call of the model"
    elif any(part.whole_batch for part in attachment.adapter.modules() if isinstance(part, Adapter)):
        reason = "mixes the rows of a call"
    elif attachment.branches:
        reason = "combines others"
    else:
        return
    raise PeftcoreError(
        f"{method} cannot adapt the experts of '{path}': the method {reason}, but the sample of a row is not known "
        "inside experts. Leave experts out of target_modules"
    )


_PREFIX = ("layers", "2", "kv_heads", "tokens", "head_dim")


@dataclass(frozen=True, slots=True)
class Attachment:
    """One adapter and the module that it is attached to.

    Args:
        path: path of the module.
        adapter: the adapter, possibly several joined into one.
        placements: the method's placements that it implements.
        link: class that runs the adapter in calls and merges it.
        branches: names of other adapters of the module that it combines.
        parts: the adapters that were joined.
    """

    path: str
    adapter: nn.Module
    placements: tuple[Placement, ...]
    link: type[Link] = Link
    branches: Sequence[str] = ()
    parts: tuple[nn.Module, ...] = ()


@dataclass
class AdapterAttachments:
    """Adapters and trained parameters of a method on `model`: the `Attachments` of the contract.

    `Placement.attach` adds to it.

    Args:
        model: the model, which is not changed.
        architecture: facts about the model.
        method: the method.
        config: config of the method, with all defaults resolved.
        attached: the adapters, one for each module.
        trained: names of trained base parameters.
        apart: names of trained parameters that are untied: trained separately from the parameters they are tied to.
        names_modules: the config lists modules by name, rather than selecting all modules of a kind.
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
        known_shape = checked_shape(self.model, self.architecture, placement, ("tokens", "hidden"), shape)
        for path, adapter in place_soft_prompt(self.model, self.architecture, placement.adapter, *known_shape):
            self.wrap(placement, path, adapter)

    def prefix(self, placement: Placement) -> None:
        prefix_shape = checked_shape(self.model, self.architecture, placement, _PREFIX)
        for path, adapter in place_prefix(self.model, self.architecture, placement.adapter, prefix_shape):
            self.wrap(placement, path, adapter)

    def join(self) -> None:
        """Join the adapters of several parameters or experts of a module into one; call it after all `attach`."""
        for path, experts in self._experts.items():
            joint: nn.Module = each_expert(self.model, self.method.name, path, [of_expert for of_expert, _ in experts])
            placements = tuple(placement for _, placement in experts)
            parts = tuple(of_expert.adapter for of_expert, _ in experts)
            self.attached.append(Attachment(path, joint, placements, ExpertLink, parts=parts))
        for path, changes in self._changes.items():
            joint = _joined(self.model, self.method.name, path, [(name, adapter) for name, adapter, _ in changes])
            placements = tuple(placement for *_, placement in changes)
            parts = tuple(adapter for _, adapter, _ in changes)
            self.attached.append(Attachment(path, joint, placements, WeightLink, parts=parts))

    @property
    def placements(self) -> dict[str, tuple[Placement, ...]]:
        """Placements of the method, by the path of the adapted module."""
        return {attachment.path: attachment.placements for attachment in self.attached}

    @property
    def paths(self) -> list[str]:
        """Paths of the modules to which adapters are attached."""
        return [attachment.path for attachment in self.attached]


def _joined(model: nn.Module, method: str, path: str, changes: Sequence[tuple[str, nn.Module]]) -> WeightChanges:
    """Join (parameter name, adapter) pairs into one adapter of the module at `path`.

    Raises:
        PeftcoreError: the module or parameter does not exist, no weight format reads it, or it has two adapters.
    """
    modules = dict(base_modules(model))
    if path not in modules:
        raise PeftcoreError(
            f"{method} places an adapter on '{path}', which is not a module of the model{nearest(path, modules)}"
        )
    parameters = dict(base_parameters(modules[path]))
    for name, _ in changes:
        parameter, submodule_path = parameters.get(name), name.rpartition(".")[0]
        if parameter is None:
            raise PeftcoreError(
                f"{method} changes the parameter '{name}' of '{path}', but this module has no such "
                f"parameter{nearest(name, parameters)}"
            )
        is_read = not submodule_path and quantized_format(modules[path], name) is not None
        if not is_read and not (parameter.is_floating_point() or parameter.is_complex()):
            raise PeftcoreError(
                f"{method} changes the parameter '{name}' of '{path}', but no weight format can read its dtype "
                f"{parameter.dtype}. Leave the module dense, or exclude it"
            )
    names = [name for name, _ in changes]
    if len(set(names)) < len(names):
        raise PeftcoreError(
            f"{method} places two adapters on the same parameter of '{path}': {sorted(names)}. Combine them into one "
            "adapter"
        )
    return WeightChanges(dict(changes))
