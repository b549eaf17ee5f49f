"""What the placements of a method attach to a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from peftcore.adaptation.chain import Link
from peftcore.architecture import Architecture
from peftcore.experts import split_expert_path
from peftcore.experts.joining import ExpertLink, OfExpert, each_expert
from peftcore.placements.on_weight import WeightLink, joined
from peftcore.placements.placement import Placement


@dataclass(frozen=True, slots=True)
class Attached:
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
class Attachments:
    """What the placements of a method attach to `model`; `Placement.attach` adds to it.

    Args:
        model: the model, which is not changed.
        architecture: facts about it.
        method: name of the method, for messages.
    """

    model: nn.Module
    architecture: Architecture
    method: str
    trained: list[str] = field(default_factory=list)
    _wrapped: list[Attached] = field(default_factory=list)
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
        """Attach `adapter` to the module at `path`, which may be the layer of one expert.

        Args:
            placement: the placement that asks for it.
            path: path of the module; "" for the model itself.
            adapter: the adapter, or one that the kind of placement makes of it.
            link: how the adapter takes part in calls of the module, and how it is merged.
            branches: names of other adapters of the module that it combines.
        """
        found = split_expert_path(self.model, path)
        if found is None:
            self._wrapped.append(Attached(path, adapter, (placement,), link, branches))
        else:
            of_expert = OfExpert(path, *found[1:], adapter, link, branches)
            self._experts.setdefault(found[0], []).append((of_expert, placement))

    def change(self, placement: Placement, path: str, name: str, adapter: nn.Module) -> None:
        """Let `adapter` change what the module at `path` reads as its parameter `name`."""
        self._changes.setdefault(path, []).append((name, adapter, placement))

    def train(self, names: Sequence[str]) -> None:
        """Train the base parameters `names`."""
        self.trained += names

    def joined(self) -> list[Attached]:
        """Return what is attached to each module, with one adapter for several parameters or experts of a module."""
        found = self._wrapped[:]
        for path, experts in self._experts.items():
            whole: nn.Module = each_expert(self.model, self.method, path, [each for each, _ in experts])
            placements = tuple(placement for _, placement in experts)
            found.append(
                Attached(path, whole, placements, ExpertLink, parts=tuple(each.adapter for each, _ in experts))
            )
        for path, changes in self._changes.items():
            whole = joined(self.model, self.method, path, [(name, adapter) for name, adapter, _ in changes])
            placements = tuple(placement for *_, placement in changes)
            found.append(Attached(path, whole, placements, WeightLink, parts=tuple(each for _, each, _ in changes)))
        return found
