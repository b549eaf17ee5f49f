"""Links of the chain of an adapted module: each adapter around or after the links inside.

    After(Around(Around(Base)))

A link is the `base` of the next adapter outside: it can be called, and returns the weight that adapters inside change.
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
    """`Base` of the next adapter outside: it computes what the module does with the adapters inside.

    Attributes:
        module: the adapted module.
    """

    __slots__ = ("module",)
    module: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    @property
    def adapter(self) -> nn.Module | None:
        """The outermost adapter of this link, which is the next inside for the adapter around it; None if none is."""
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

        If no adapter inside changes it, it has the stored dtype (float32 if quantized), else float32 with gradients.

        Raises:
            PeftcoreError: no format reads the module's weight, or an adapter inside does not change a weight.
        """
        return self.weight_and_bias()[0]

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """Return `weight()`, and the bias `[out]` likewise, or None if the module has none."""
        raise NotImplementedError


class Link(ChainLink):
    """One adapter around the links inside.

    A kind of placement whose adapters take part in a call, or are merged, in another way has its own subclass. What is
    asked of the class holds whether the adapter is active or not.

    Attributes:
        follows: calling the link calls the links inside, and then the adapter with the first value of their output.
        merges_by: the member of adapters that merging calls, for messages.
        calls_adapter: a call calls the adapter, so adapters of one class may run together (`Adapter.per_sample`).
        follows_division: at a linear layer that tensor parallelism divides, a call with whole inputs and outputs
            (`peftcore.engine.adaptation.tensor_parallel`) computes what one process does.
    """

    __slots__ = ("_adapter", "_base", "_name")
    follows: ClassVar[bool] = False
    merges_by: ClassVar[str] = "merged"
    calls_adapter: ClassVar[bool] = True
    follows_division: ClassVar[bool] = True

    @staticmethod
    def changes_of(adapter: Any) -> Mapping[str, Any]:
        """Return the changes of single parameters that an attached adapter consists of, by the parameter's name.

        Empty if it acts on calls of the module; it is then merged by `merged`, after all changes of parameters.
        """
        return {}

    @classmethod
    def is_mergeable(cls, adapter: nn.Module) -> bool:
        """Return whether an attached adapter only changes weights."""
        return implements(adapter, Adapter.merged)

    @staticmethod
    def merged_change(change: Any, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return a parameter with one of `changes_of`, and the bias that belongs to it, if there is one; fp32."""
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
                f"an adapter reads the weight of a {type(self.module).__name__}, around which '{self._name}' "
                f"({type(self._adapter).__name__}) is active, which is not a change of a weight. Activate that adapter "
                "after it, or deactivate it: peftcore.activate(model, [...])"
            )
        weight, bias = self._base.weight_and_bias()
        return self._adapter.merged(weight.float(), None if bias is None else bias.float())
