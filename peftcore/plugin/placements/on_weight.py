"""`OnWeight`: an adapter changes the value that a module's forward reads as a parameter."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from peftcore.plugin.adapter import Adapter, Base, implements, neutral_of_joined
from peftcore.plugin.link import Link
from peftcore.plugin.placements.placement import Placement

if TYPE_CHECKING:
    from peftcore.plugin.placements.placement import Attachments


@dataclass(frozen=True, slots=True)
class OnWeight(Placement):
    """Placement on a parameter: `adapter(weight) -> weight` changes the value that forward reads as `name`.

    Supported for all modules: convolutions, embeddings, `nn.MultiheadAttention` (`in_proj_weight`), experts `[E, out,
    in]`. A dotted name (`out_proj.weight`) is a parameter of a submodule whose weight is read without calling the
    submodule. The adapter is called once in each call of the module, with the parameter as it is stored, or with the
    dense weight if it is quantized. The adapter is a pure function, so it can be merged without `merged`.

    An adapter of experts' weights that is one low-rank product per expert can define `Adapter.expert_low_rank`.
    """

    path: str
    name: str
    adapter: nn.Module

    def attach(self, to: Attachments) -> None:
        to.change(self, self.path, self.name, self.adapter)

    @property
    def key(self) -> str | None:
        return self.reached(self.path)

    def reached(self, path: str) -> str:
        return f"{path}.{self.name}" if path else self.name

    def copied_weight(self, path: str) -> str | None:
        return None if implements(self.adapter, Adapter.expert_low_rank) else self.reached(path)

    def divided(self, path: str, parameters: Sequence[str], divided: Collection[str]) -> str | None:
        return Placement.divided(self, path, [*parameters, self.reached(path)], divided)


class WeightChanges(Adapter):
    """All changes of one module's parameters with the same adapter name, by the parameter's name."""

    def __init__(self, adapters: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, adapter in adapters.items():
            self._modules[name.replace(".", "/")] = adapter

    @property
    def changes(self) -> dict[str, Any]:
        """Changes (parameter -> value that is read instead), by the parameter's name."""
        return {key.replace("/", "."): adapter for key, adapter in self._modules.items()}

    @property
    def multiplier(self) -> float | None:
        """Common multiplier of all adapters inside, or None if one of them has no multiplier."""
        each = [adapter.multiplier if isinstance(adapter, Adapter) else None for adapter in self._modules.values()]
        return None if None in each else each[0]

    @multiplier.setter
    def multiplier(self, factor: float | None) -> None:
        pass

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        return base.on_weights(self.changes)(*args, **kwargs)

    def neutral(self) -> dict[str, Tensor]:
        return neutral_of_joined(self)


class WeightLink(Link):
    """Link of `WeightChanges`. The adapters are pure functions of the parameters, so they can be merged."""

    __slots__ = ()
    merges_by = "forward"

    @staticmethod
    def changes_of(adapter: Any) -> Mapping[str, Any]:
        changes: dict[str, Any] = adapter.changes
        return changes

    @classmethod
    def is_mergeable(cls, adapter: nn.Module) -> bool:
        return True

    @staticmethod
    def merged_change(change: Any, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return change(weight).float(), bias

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        result: tuple[Tensor, Tensor | None] = self._base.on_weights(self._adapter.changes).weight_and_bias()
        return result
