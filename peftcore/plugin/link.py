"""Links in the chain of an adapted module: each adapter is around or after the links inside it.

    After(Around(Around(Base)))

A link is the `base` of the next adapter outside. It can be called, and it returns the weight as changed by the adapters
inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor, nn

from peftcore.errors import PeftcoreError
from peftcore.plugin.adapter import Adapter, Change, implements

if TYPE_CHECKING:
    from peftcore.ops import PackedWeight


class ChainLink:
    """`Base` of the next adapter outside: the module with the adapters inside this link.

    Attributes:
        module: the adapted module.
    """

    __slots__ = ("module",)
    module: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    @property
    def adapter(self) -> nn.Module | None:
        """The outermost adapter of this link, or None. For the adapter around the link, it is the next inside."""
        return None

    @property
    def inside(self) -> Any:
        """`Base` of `adapter`."""
        raise NotImplementedError

    def on_weights(self, changes: Mapping[str, Change]) -> ChainLink:
        """See `Base.on_weights`."""
        raise NotImplementedError

    def linear_operands(self, x: Tensor) -> tuple[Tensor | PackedWeight, Tensor | None] | None:
        """See `Base.linear_operands`."""
        return None

    def weight(self) -> Tensor:
        """Return the dense weight in the layout of `WeightFormat` (`[out, in]` of a linear), as adapters change it.

        If no adapter inside changes the weight, it has the stored dtype (float32 if quantized); otherwise it is float32
        with gradients.

        Raises:
            PeftcoreError: no format reads the module's weight, or an adapter inside does not change a weight.
        """
        return self.weight_and_bias()[0]

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """Return `weight()`, and the bias `[out]` likewise, or None if the module has none."""
        raise NotImplementedError


class Link(ChainLink):
    """One adapter around the links inside.

    A kind of placement has its own subclass if its adapters run in calls, or are merged, in another way. The class
    attributes hold whether the adapter is active or not.

    Attributes:
        follows: calling the link calls the links inside, then the adapter with the first value of their output.
        merges_by: the member of adapters that merging calls, for error messages.
        calls_adapter: a call of the link calls the adapter, so adapters of one class can run together
            (`Adapter.per_sample`).
        follows_division: at a tensor-parallel linear layer, a call with full inputs and outputs
            (`peftcore.engine.adaptation.tensor_parallel`) computes the same as in one process.
    """

    __slots__ = ("_adapter", "_base", "_name")
    follows: ClassVar[bool] = False
    merges_by: ClassVar[str] = "merged"
    calls_adapter: ClassVar[bool] = True
    follows_division: ClassVar[bool] = True

    @staticmethod
    def changes_of(adapter: Any) -> Mapping[str, Any]:
        """Return the parameter changes that an attached adapter consists of, by the parameter's name.

        Empty if the adapter acts on calls of the module. It is then merged by `merged`, after all parameter changes.
        """
        return {}

    @classmethod
    def is_mergeable(cls, adapter: nn.Module) -> bool:
        """Return whether an attached adapter only changes weights."""
        return implements(adapter, Adapter.merged)

    @staticmethod
    def merged_change(change: Any, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return a parameter after one of the changes in `changes_of`, and its bias if there is one, both fp32."""
        raise NotImplementedError

    def __init__(self, name: str, adapter: nn.Module, base: Any) -> None:
        self.module = base.module
        self._name = name
        self._adapter: Any = adapter
        self._base = base

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._adapter(self._base, *args, **kwargs)

    @property
    def adapter(self) -> nn.Module:
        return cast(nn.Module, self._adapter)

    @property
    def inside(self) -> Any:
        return self._base

    def on_weights(self, changes: Mapping[str, Change]) -> Link:
        return type(self)(self._name, self._adapter, self._base.on_weights(changes))

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        if not implements(self._adapter, Adapter.merged):
            raise PeftcoreError(
                f"an adapter reads the weight of a {type(self.module).__name__}, but the active adapter "
                f"'{self._name}' ({type(self._adapter).__name__}) around that module does not act as a change of the "
                f"weight. Activate '{self._name}' after the adapter that reads the weight, or deactivate it: "
                "peftcore.activate(model, [...])"
            )
        weight, bias = self._base.weight_and_bias()
        return self._adapter.merged(weight.float(), None if bias is None else bias.float())
