"""Types of adapters: `Adapter`, with optional members, and `Base`, which an adapter around a module calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn
from typing_extensions import TypeIs

if TYPE_CHECKING:
    from peftcore.ops import PackedWeight

Change = Callable[[Tensor], Tensor]  # a parameter -> the value that is read instead


@dataclass(frozen=True)
class LowRank:
    """Low-rank change of a weight: scale · `b.flatten(1) @ a.flatten(1)`, or scale · B_e A_e for each expert e.

    Where one module holds several weights, the products of several are concatenated along the output dimension.

    Args:
        a: `[r, ...]`; for experts `[experts, r, in]`.
        b: `[out, r, ...]`; for experts `[experts, out, r]`, for any layout of the weight. Factors may be parameters
            of the adapter, which `combine` and `load` can set, or be computed from them.
        scale: factor of the product.
        transposed: the change of the weight is the transposed product, as for an embedding, `[vocabulary, dim]`.
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
        """Wrapped module. Its parameters and forward are without adapters."""

    @property
    def adapter(self) -> nn.Module | None:
        """Next adapter inside, or None if `base` is the module's own forward."""

    @property
    def inside(self) -> Base:
        """Argument `base` of the next adapter inside. Only if `adapter` is not None."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped module with the adapters inside this one."""

    def on_weights(self, changes: Mapping[str, Change]) -> Base:
        """Return the same call with changed parameters: {name, such as `weight` or `out_proj.weight`: change}.

        For modules that read a submodule's weight without calling it, and for layers that do more than a product.
        """

    def linear_operands(self, x: Tensor) -> tuple[Tensor | PackedWeight, Tensor | None] | None:
        """Return (weight `[out, in]`, bias) if calling this with `x` computes x Wᵀ + b with W frozen, else None."""

    def weight(self) -> Tensor:
        """Return the dense weight in the layout of `WeightFormat` (`[out, in]` for a linear layer).

        It includes the changes of adapters inside, in float32 with gradients. Without such adapters it has the stored
        dtype, or float32 if it is quantized.

        Raises:
            PeftcoreError: no format reads the module's weight, or an adapter inside is not a change of a weight.
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
        """Return the adapter `name` of this module, alone around the module's own forward."""


class Adapter(nn.Module):
    """Base class of adapters. All members are optional; a default means that the adapter does not support it.

    Mark the members that you write with `@override` (of typing_extensions), so that a type checker finds misspelt ones.
    A plain `nn.Module` can also be placed, if it has none of these members.

    Attributes:
        needs_call: the adapter reads `current_call()`. A tuple names keyword arguments of the model's calls that are
            only for adapters. Modules inside the adapter can also set it, if they derive from `Adapter`.
        whole_batch: the adapter mixes samples of a batch, so it cannot run on a part of them.
        multiplier: factor of the change in `forward` and `merged`, which `peftcore.scale` sets; 1.0 if the adapter
            supports it, else None. See `PeftRules.scaled`.
    """

    needs_call: bool | tuple[str, ...] = False
    whole_batch: bool = False
    multiplier: float | None = None

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight and the bias that compute the same without the adapter; for `Around`.

        It must be a pure function of float32 tensors in the layout of `WeightFormat`. The bias is None if the module
        has none.
        """
        raise NotImplementedError

    def low_rank(self) -> list[LowRank]:
        """Return the low-rank products whose sum `merged` (or the forward of `OnWeight`) adds to the weight."""
        raise NotImplementedError

    def expert_low_rank(self) -> LowRank | None:
        """Return the change of all experts' weights as one product per expert, or None; for `OnWeight`.

        If transformers' experts interface runs the module and all its changes have this member, the products are added
        to those of the weights, without a copy of the weights. Only then inputs can be dropped.
        """
        raise NotImplementedError

    def neutral(self) -> dict[str, Tensor]:
        """Return the value of each parameter, by name, at which the adapter changes nothing.

        For adapters whose change is linear in their parameters: change(t0 + w (t - t0)) = w · change(t). Buffers are
        constants: adapters can be combined if theirs are equal.
        """
        raise NotImplementedError

    def on_parts(self, base: Callable[[Tensor], Tensor], division: Any, x: Tensor) -> Tensor:
        """Return `forward` on this rank's part of a linear layer that tensor parallelism divides; for `Around`.

        Without it, such an adapter is called with gathered inputs and outputs, which is right, and costs a message of
        their size. It is only used if the class that defines `forward` defines it, too.

        Args:
            base: the layer with the adapters inside, as this rank computes it.
            division: a `Division`, which says what is divided, and joins parts. The adapter's tensors are whole
                and equal on all ranks, and their gradients must be.
            x: this rank's input.
        """
        raise NotImplementedError

    def in_output(self) -> bool:
        """Return whether the states of this soft prompt stay in the output of the backbone; asked in each call."""
        return False

    @staticmethod
    def per_sample(adapters: Sequence[Any], index: Tensor, base: Base, *args: Any, **kwargs: Any) -> Any:
        """Run several adapters of this class in one pass; return the output, or NotImplemented.

        Args:
            adapters: the adapters.
            index: int64 `[x.shape[0]]`, the adapter of each row of the first tensor; -1: none. Samples are in dimension
                0 of the first tensor.
            base: the module's own forward.
        """
        return NotImplemented


def implements(adapter: Any, member: Callable[..., Any]) -> TypeIs[Adapter]:
    """Return whether the class of `adapter` overrides an optional member, as in `implements(a, Adapter.merged)`."""
    return isinstance(adapter, Adapter) and getattr(type(adapter), member.__name__) is not member


def neutral_of(adapter: Any) -> dict[str, Tensor] | None:
    """Return `adapter.neutral()`, or None if it, or an adapter that it joins, has no neutral tensors."""
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
    """Return an optional member of a class that does not derive from `Adapter`, where it is ignored, or None.

    Args:
        kind: the class.
        inside: its modules are only inside adapters, where fewer members are used.
    """
    members = ["needs_call", "whole_batch"]
    if not inside:
        members += ["merged", "low_rank", "expert_low_rank", "neutral", "on_parts", "in_output", "per_sample"]
        members.append("multiplier")
    return None if issubclass(kind, Adapter) else next((name for name in members if hasattr(kind, name)), None)
