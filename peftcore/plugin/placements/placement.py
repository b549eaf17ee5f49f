"""Base classes of placements: the interface between the core and each kind."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from torch import nn

from peftcore.plugin.link import Link
from peftcore.plugin.peft_keys import key_in_model

if TYPE_CHECKING:
    from peftcore.plugin.architecture import Architecture


class Attachments(Protocol):
    """Collects what a placement attaches to a model. Each kind calls these methods in `Placement.attach`.

    Attributes:
        model: the model, which must not be changed.
        architecture: description of the model.
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
        """Attach `adapter` to the module at `path`, which may be one expert's layer.

        Args:
            placement: the placement that attaches the adapter.
            path: path of the module; "" for the model itself.
            adapter: the adapter, or a module that the kind of placement derives from it.
            link: how the adapter takes part in calls of the module, and how it is merged.
            branches: names of other adapters of the module that this adapter combines.
        """

    def change(self, placement: Placement, path: str, name: str, adapter: nn.Module) -> None:
        """Let `adapter` change the value that the module at `path` reads as its parameter `name`."""

    def train(self, names: Sequence[str]) -> None:
        """Train the base parameters `names`."""

    def prompt(self, placement: Placement, shape: tuple[int, int] | None) -> None:
        """Prepend the adapter's vectors to the embedded input. Pass `shape` if the adapter cannot be called yet."""

    def prefix(self, placement: Placement) -> None:
        """Put the adapter's keys and values at the start of the cache."""


class Placement:
    """Where an adapter is attached to a model, which determines merging, names on disk and sharding.

    A kind derives from this class, or from `AtModule`, as a frozen dataclass.

    Attributes:
        adapter: the adapter.
        branches: names of other adapters of the module that this one combines.
        has_adapter: Whether the kind has an adapter; False for a kind that trains parameters of the base instead.
        whole_model: Whether the kind changes the model's input or cache instead of layers that the method selects.
    """

    __slots__ = ()
    adapter: nn.Module
    branches: Sequence[str] = ()
    has_adapter: ClassVar[bool] = True
    whole_model: ClassVar[bool] = False

    def attach(self, to: Attachments) -> None:
        """Attach to the model, by calling `to.wrap`, `to.change` and `to.train` any number of times."""
        raise NotImplementedError

    @property
    def key(self) -> str | None:
        """Key in `AdapterModules`: the path of the module or parameter, or None if the adapter has no such place."""
        return None

    def tensor_name(self, name: str) -> str:
        """Return the name in PEFT's files of the adapter's tensor `name`."""
        return name if self.key is None else key_in_model(self.key, name)

    def reached(self, path: str) -> str:
        """Return what the adapter changes when attached to the module at `path`: that path, or a parameter's name."""
        return path

    def copied_weight(self, path: str) -> str | None:
        """Return the full name of the parameter that is copied and changed in each call, or None."""
        return None

    def is_of_expert(self, path: str) -> bool:
        """Return whether the adapter belongs to a single expert of the module at `path`."""
        return False

    def divided(self, path: str, parameters: Sequence[str], divided: Collection[str]) -> str | None:
        """Return a parameter that the adapter needs in full although tensor parallelism shards it, or None.

        Args:
            path: path of a module to which the adapter is attached.
            parameters: full names of the module's own parameters.
            divided: full names of all sharded parameters of the model, at least one.
        """
        return next((name for name in parameters if name in divided), None)

    def peft_tasks(self, architecture: Architecture) -> Sequence[str]:
        """Return the task types with which PEFT adds the adapter to a model that has no task type of its own."""
        return ()


class AtModule(Placement):
    """Placement of an adapter at one module. The adapter takes part in the module's calls.

    Attributes:
        path: path of the module or of one expert's layer; "" for the model itself.
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
        return path if self.path == path else f"{path}.{self.path.rpartition('.')[2]}"  # stacked weight of experts

    def is_of_expert(self, path: str) -> bool:
        return self.path != path
