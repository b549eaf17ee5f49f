"""`Adapter`, the base class of adapters, and `Base`, the module that an `Around` adapter wraps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn
from typing_extensions import TypeIs

if TYPE_CHECKING:
    from peftcore.ops import PackedWeight

Change = Callable[[Tensor], Tensor]  # maps a parameter to the value that is read instead


@dataclass(frozen=True)
class LowRank:
    """Low-rank change of a weight: scale · `b.flatten(1) @ a.flatten(1)`, or scale · B_e A_e for each expert e.

    If one module holds several weights, their products are concatenated along the output dimension.

    Args:
        a: `[r, ...]`; for experts `[experts, r, in]`.
        b: `[out, r, ...]`; for experts `[experts, out, r]`, for any layout of the weight. Factors are parameters of the
            adapter, which `combine` and `load` can set, or are computed from parameters.
        scale: factor of the product.
        transposed: the change of the weight is the transposed product, as for an embedding `[vocabulary, dim]`.
        dropout_p: dropout probability of the inputs of A. Only for experts.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0
    transposed: bool = False
    dropout_p: float = 0.0


class Base(Protocol):
    """Argument `base` of an `Around` adapter: the wrapped module, with the adapters inside this one."""

    @property
    def module(self) -> Any:
        """Wrapped module. Its parameters and forward do not include adapters."""

    @property
    def adapter(self) -> nn.Module | None:
        """Next adapter inside, or None if `base` is the module's own forward."""

    @property
    def inside(self) -> Base:
        """Argument `base` of the next adapter inside. Only if `adapter` is not None."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped module, including the adapters inside this one."""

    def on_weights(self, changes: Mapping[str, Change]) -> Base:
        """Return this callable with changed parameters: {name, such as `weight` or `out_proj.weight`: change}.

        For modules that read a submodule's weight without calling it, and for layers that compute more than a product.
        """

    def linear_operands(self, x: Tensor) -> tuple[Tensor | PackedWeight, Tensor | None] | None:
        """Return (weight `[out, in]`, bias) if calling this with `x` computes x Wᵀ + b with W frozen, else None."""

    def weight(self) -> Tensor:
        """Return the dense weight in the layout of `WeightFormat` (`[out, in]` for a linear layer).

        The weight includes the changes of adapters inside, in float32 with gradients. Without such adapters it has the
        stored dtype, or float32 if it is quantized.

        Raises:
            PeftcoreError: no format reads the module's weight, or an adapter inside does not change a weight.
        """

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """Return `weight()` and the bias, `[out]`, or None if the module has none."""


class BranchedBase(Base, Protocol):
    """Argument `base` of an `Around` adapter with `branches`."""

    @property
    def own(self) -> Base:
        """Module's own forward, without adapters."""

    @property
    def is_own(self) -> bool:
        """Whether no other adapter is inside, so that calling `base` calls `own`."""

    def branch(self, name: str) -> Base:
        """Return only the adapter `name`, applied around the module's own forward."""


class Adapter(nn.Module):
    """Base class of adapters.

    All members are optional. The default of a member means that the adapter does not support it.

    Mark overridden members with typing_extensions' `@override`, so that a type checker finds misspelt names. A plain
    `nn.Module` can be placed as well, if it has none of these members.

    Attributes:
        needs_call: the adapter reads `current_call()`. A tuple contains the names of keyword arguments of the model's
            calls that are only for adapters. Modules inside the adapter can also set it, if they derive from `Adapter`.
        whole_batch: the adapter mixes samples of a batch, so it cannot run on a subset of them.
        multiplier: factor of the change in `forward` and `merged`, which `peftcore.scale` sets; 1.0 if the adapter
            supports it, else None. See `PeftRules.scaled`.
    """

    needs_call: bool | tuple[str, ...] = False
    whole_batch: bool = False
    multiplier: float | None = None

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight and bias that compute the same without the adapter; for `Around`.

        This must be a pure function of float32 tensors in the layout of `WeightFormat`. The bias is None if the module
        has none.
        """
        raise NotImplementedError

    def low_rank(self) -> list[LowRank]:
        """Return the low-rank products whose sum `merged` (or the forward of `OnWeight`) adds to the weight."""
        raise NotImplementedError

    def expert_low_rank(self) -> LowRank | None:
        """Return the change of all experts' weights as one product per expert, or None; for `OnWeight`.

        If transformers' experts interface runs the module and all its changes have this member, the products are added
        to those of the weights, without a copy of the weights. Dropout of the inputs is only possible in this case.
        """
        raise NotImplementedError

    def neutral(self) -> dict[str, Tensor]:
        """Return values of the parameters, by name, for which the adapter is the identity.

        For adapters whose change is linear in their parameters: change(t0 + w (t - t0)) = w · change(t). Buffers are
        constants: adapters can be combined if their buffers are equal.
        """
        raise NotImplementedError

    def on_parts(self, base: Callable[[Tensor], Tensor], division: Any, x: Tensor) -> Tensor:
        """Compute `forward` on this rank's shard of a tensor-parallel linear layer; for `Around`.

        Without this member, the adapter is called with gathered inputs and outputs, which is correct but communicates
        them. It is only used if the class that defines `forward` also defines it.

        Args:
            base: this rank's shard of the layer, with the adapters inside.
            division: a `Division`, which describes the sharding and has the collective operations. The adapter's
                tensors are full tensors, equal on all ranks, and their gradients must be equal as well.
            x: this rank's input.
        """
        raise NotImplementedError

    def in_output(self) -> bool:
        """Return whether this soft prompt's hidden states stay in the backbone's output.

        Called in each forward pass.
        """
        return False

    @staticmethod
    def per_sample(adapters: Sequence[Any], index: Tensor, base: Base, *args: Any, **kwargs: Any) -> Any:
        """Run several adapters of this class in one pass, and return the output, or NotImplemented.

        Args:
            adapters: the adapters.
            index: int64 `[x.shape[0]]`, index of the adapter for each row of the first tensor, or -1 for none.
                Dimension 0 of the first tensor is the batch dimension.
            base: the module's own forward.
        """
        return NotImplemented


def implements(adapter: Any, member: Callable[..., Any]) -> TypeIs[Adapter]:
    """Return whether the class of `adapter` overrides an optional member, as in `implements(a, Adapter.merged)`."""
    return isinstance(adapter, Adapter) and getattr(type(adapter), member.__name__) is not member


def neutral_of(adapter: Any) -> dict[str, Tensor] | None:
    """Return `adapter.neutral()`, or None if the adapter, or an adapter that it joins, has no neutral tensors."""
    if not implements(adapter, Adapter.neutral):
        return None
    try:
        return adapter.neutral()
    except NotImplementedError:
        return None


def neutral_of_joined(adapter: nn.Module) -> dict[str, Tensor]:
    """Return the neutral tensors of all adapters that `adapter` joins as its children.

    Raises:
        NotImplementedError: one of them has none.
    """
    neutral_by_name = {name: neutral_of(tensors) for name, tensors in adapter.named_children()}
    if None in neutral_by_name.values():
        raise NotImplementedError
    return {
        f"{name}.{key}": value for name, tensors in neutral_by_name.items() for key, value in (tensors or {}).items()
    }


def unseen_member(kind: type[nn.Module], *, inside: bool) -> str | None:
    """Return an optional member that is ignored because the class does not derive from `Adapter`, or None.

    Args:
        kind: the class.
        inside: the class is only used inside adapters, where fewer members are used.
    """
    members = ["needs_call", "whole_batch"]
    if not inside:
        members += ["merged", "low_rank", "expert_low_rank", "neutral", "on_parts", "in_output", "per_sample"]
        members.append("multiplier")
    return None if issubclass(kind, Adapter) else next((name for name in members if hasattr(kind, name)), None)
