"""Base classes of placements: what the core asks of each kind."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from torch import nn

from peftcore.plugin.link import Link
from peftcore.plugin.peft_keys import key_in_model

if TYPE_CHECKING:
    from peftcore.plugin.architecture import Architecture


class Attachments(Protocol):
    """What a placement attaches to a model: each kind calls one of these methods in `Placement.attach`.

    Attributes:
        model: the model, which is not changed.
        architecture: facts about it.
    """

    model: nn.Module
    architecture: Architecture

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

    def change(self, placement: Placement, path: str, name: str, adapter: nn.Module) -> None:
        """Let `adapter` change what the module at `path` reads as its parameter `name`."""

    def train(self, names: Sequence[str]) -> None:
        """Train the base parameters `names`."""

    def prompt(self, placement: Placement, shape: tuple[int, int] | None) -> None:
        """Put the vectors of the placement's adapter before the embedded input; `shape` if it cannot be called now."""

    def prefix(self, placement: Placement) -> None:
        """Put the keys and values of the placement's adapter at the start of the cache."""


class Placement:
    """Where an adapter is attached to a model, and what follows from it: merging, names on disk, sharding.

    A kind derives from this class, or from `AtModule`, as a frozen dataclass.

    Attributes:
        adapter: the adapter.
        branches: names of other adapters of the module that this one combines.
        has_adapter: False for a kind that trains parameters of the base instead.
        whole_model: True for a kind that changes the model's input or cache instead of layers that the method chooses.
    """

    __slots__ = ()
    adapter: nn.Module
    branches: Sequence[str] = ()
    has_adapter: ClassVar[bool] = True
    whole_model: ClassVar[bool] = False

    def attach(self, to: Attachments) -> None:
        """Declare what is attached to the model, by any number of calls of `to.wrap`, `to.change` and `to.train`."""
        raise NotImplementedError

    @property
    def key(self) -> str | None:
        """Key in `AdapterModules`: the path of the module or parameter, or None if the adapter has no such place."""
        return None

    def tensor_name(self, name: str) -> str:
        """Return the name on disk, as PEFT's files have it, of the adapter's tensor `name`."""
        return name if self.key is None else key_in_model(self.key, name)

    def reached(self, path: str) -> str:
        """Return what the adapter changes where it is attached to the module at `path`: that path, or a parameter."""
        return path

    def copied_weight(self, path: str) -> str | None:
        """Return the full name of the parameter of which each call makes a changed copy, or None."""
        return None

    def is_of_expert(self, path: str) -> bool:
        """Return whether the adapter is that of one expert of the module at `path`."""
        return False

    def divided(self, path: str, parameters: Sequence[str], divided: Collection[str]) -> str | None:
        """Return a parameter that must be whole and that tensor parallelism divides over the ranks, or None.

        Args:
            path: path of a module to which the adapter is attached.
            parameters: full names of the module's own parameters.
            divided: full names of all parameters of the model that are divided; there is at least one.
        """
        return next((name for name in parameters if name in divided), None)

    def peft_tasks(self, architecture: Architecture) -> Sequence[str]:
        """Return the task types of PEFT that add the adapter to a model that has no task type of its own."""
        return ()


class AtModule(Placement):
    """Placement of an adapter at one module, in whose calls it takes part.

    Attributes:
        path: path of the module, also of the layer of one expert; "" for the model itself.
        link: how the adapter takes part in a call, and whether and how it is merged.
    """

    __slots__ = ()
    path: str
    link: ClassVar[type[Link]] = Link

    def attach(self, to: Attachments) -> None:
        to.wrap(self, self.path, self.adapter, self.link, self.branches)

    @property
    def key(self) -> str | None:
        return self.path

    def reached(self, path: str) -> str:
        return path if self.path == path else f"{path}.{self.path.rpartition('.')[2]}"  # an expert's stacked weight

    def is_of_expert(self, path: str) -> bool:
        return self.path != path
