"""The types of an adapter: `Adapter`, whose members are optional, and `Base`, what an adapter around a module calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn
from typing_extensions import TypeIs

if TYPE_CHECKING:
    from peftcore.ops import PackedWeight

Change = Callable[[Tensor], Tensor]  # a parameter -> what is read in its place


@dataclass(frozen=True)
class LowRank:
    """A low-rank change of a weight: scale · `b.flatten(1) @ a.flatten(1)`, or scale · B_e A_e for each expert e.

    Where one module holds several weights, the products of several are concatenated along the output dimension.

    Args:
        a: `[r, ...]`; of experts `[experts, r, in]`.
        b: `[out, r, ...]`; of experts `[experts, out, r]`, whatever the layout of the weight. Factors may be parameters
            of the adapter, which `combine` and `load` can fill, or be computed from them.
        scale: factor of the product.
        transposed: the change of the weight is the transposed product, as for an embedding, `[vocabulary, dim]`.
        dropout_p: probability with which inputs are dropped before A. Only for experts.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0
    transposed: bool = False
    dropout_p: float = 0.0


class Base(Protocol):
    """What an `Around` adapter is given as `base`: the wrapped module, with the adapters inside this one."""

    @property
    def module(self) -> Any:
        """The wrapped module. Its parameters and forward are without adapters."""

    @property
    def adapter(self) -> nn.Module | None:
        """The next adapter inside, or None where `base` is the module's own forward."""

    @property
    def inside(self) -> Base:
        """What the next adapter inside is given as `base`. Only where `adapter` is not None."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped module with the adapters inside this one."""

    def on_weights(self, changes: Mapping[str, Change]) -> Base:
        """Return the same call with changed parameters: {name, such as `weight` or `out_proj.weight`: change}.

        For modules that read weights past the layers that hold them, and layers that do more than their product.
        """

    def linear_operands(self, x: Tensor) -> tuple[Tensor | PackedWeight, Tensor | None] | None:
        """Return (weight `[out, in]`, bias) where calling this with `x` is x Wᵀ + b with W frozen, else None."""

    def weight(self) -> Tensor:
        """Return the dense weight in the layout of `WeightFormat` (`[out, in]` of a linear layer).

        It includes the changes of adapters inside, in float32 with gradients. Without any it has the stored dtype, or
        float32 where it is quantized.

        Raises:
            PeftcoreError: no format reads the module's weight, or an adapter inside does not change a weight.
        """

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """Return `weight()` and the bias, `[out]` or None where the module has none."""


class BranchedBase(Base, Protocol):
    """What an `Around` adapter with `branches` is given as `base`."""

    @property
    def own(self) -> Base:
        """The module's own forward, without adapters."""

    @property
    def is_own(self) -> bool:
        """Whether no other adapter is inside, so that calling `base` calls `own`."""

    def branch(self, name: str) -> Base:
        """Return the adapter `name` of this module, alone around the module's own forward."""


class Adapter(nn.Module):
    """Base class of adapters. All members are optional; each default means that the adapter cannot do it.

    Mark the members that you write with `@override` (of typing_extensions): a type checker then finds a misspelt one.
    A plain `nn.Module` can be placed as well, as long as it has none of these members.

    Attributes:
        needs_call: the adapter reads `current_call()`. A tuple names keyword arguments of the model's calls that are
            only for adapters. Modules inside the adapter can set it, too, where they derive from `Adapter`.
        whole_batch: the adapter mixes samples of a batch, so it cannot run on some of them alone.
        multiplier: factor of the change in `forward` and `merged`, which `peftcore.scale` sets; 1.0 where the adapter
            has it, None where it has not. See `PeftRules.scaled`.
    """

    needs_call: bool | tuple[str, ...] = False
    whole_batch: bool = False
    multiplier: float | None = None

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight and the bias that compute the same without the adapter; for `Around`.

        A pure function of float32 tensors in the layout of `WeightFormat`. The bias is None where the module has none.
        """
        raise NotImplementedError

    def low_rank(self) -> list[LowRank]:
        """Return the low-rank products that `merged` (or the forward of `OnWeight`) adds to the weight, and no more."""
        raise NotImplementedError

    def expert_low_rank(self) -> LowRank | None:
        """Return the change of the weight of all experts as one product for each, or None; for `OnWeight`.

        Where transformers' experts interface runs the module and all changes of the module have it, the products join
        those of the weights, and nothing as large as the weights is made. Only there inputs can be dropped.
        """
        raise NotImplementedError

    def neutral(self) -> dict[str, Tensor]:
        """Return the value of each tensor at which the adapter changes nothing.

        For adapters whose change is linear in their tensors: change(t0 + w (t - t0)) = w · change(t).
        """
        raise NotImplementedError

    def in_output(self) -> bool:
        """Return whether the states of this soft prompt stay in the output of the backbone; asked in each call."""
        return False

    @staticmethod
    def per_sample(adapters: Sequence[Any], index: Tensor, base: Base, *args: Any, **kwargs: Any) -> Any:
        """Run several adapters of this class in one pass, and return the output, or NotImplemented.

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


def unseen_member(kind: type[nn.Module], *, inside: bool) -> str | None:
    """Return an optional member of a class that does not derive from `Adapter`, so that nobody looks at it, or None.

    Args:
        kind: the class.
        inside: its modules are only inside adapters, of which fewer members are looked at.
    """
    members = ["needs_call", "whole_batch"]
    if not inside:
        members += ["merged", "low_rank", "expert_low_rank", "neutral", "in_output", "per_sample", "multiplier"]
    return None if issubclass(kind, Adapter) else next((name for name in members if hasattr(kind, name)), None)
