"""What the public functions of operators do before they call one: rules of autocast, `torch.func` and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from peftcore.ops.weight import PackedWeight


def operator_for(name: str, seed: torch.Tensor | None) -> Any:
    """Return the operator `name` for a call with this seed: a compiled model keeps the CPU's out of CUDA graphs."""
    seeded = seed is not None and seed.device.type == "cpu" and torch.compiler.is_compiling()
    return getattr(torch.ops.peftcore, f"{name}_seeded" if seeded else name)


def is_exporting() -> bool:
    """Return whether `torch.export` traces."""
    # torch.compiler.is_exporting() is also true in torch.compile of PyTorch 2.9.
    return torch.compiler._is_exporting_flag


def unviewed(y: torch.Tensor) -> torch.Tensor:
    """Return `y` as a tensor that is not a view, for the forward of a `torch.autograd.Function`.

    A model may then add to it in place (as Llama 4 does to the output of its shared expert), which autograd forbids for
    views that a custom function returns.
    """
    if torch.compiler.is_compiling() or not y._is_view():
        return y
    return torch.ops.aten._unsafe_view.default(y, y.shape)


def transformed() -> bool:
    """Return whether a transform of `torch.func` (vmap, grad, jvp) or a dual level of `forward_ad` is active.

    They see through PyTorch's own operators alone.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def second_order(
    formula: Callable[..., Tensor], inputs: Sequence[Tensor], needs: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Return gradients of formula(*inputs) that can be differentiated, for a backward pass with `create_graph=True`.

    Each is taken with respect to a view of its input: an input may be computed from another one, or be the same tensor,
    and the gradient of one argument must not contain what reaches it through another.

    Returns:
        A gradient for each input that `needs` one, None for the others.
    """
    views = [t.view_as(t) for t in inputs]
    wanted = [view for view, needed in zip(views, needs, strict=True) if needed]
    found = iter(torch.autograd.grad(formula(*views), wanted, grad, create_graph=True))
    return [next(found) if needed else None for needed in needs]


def permuted(t: Tensor, weight: Tensor | PackedWeight) -> Tensor:
    """Return `t` `[.., in]`, x or a low-rank product's A, with its columns in the order of the weight's codes."""
    if isinstance(weight, Tensor) or weight.permutation is None:
        return t
    return t.index_select(-1, weight.permutation)


def autocast_device(x: Tensor) -> str:
    """Return the device type whose autocast applies to x: for meta tensors, which PyTorch lacks, that of the CPU."""
    return "cpu" if x.is_meta else x.device.type


def frozen_operands(
    x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None
) -> tuple[Tensor, list[Tensor], list[int], Tensor | None]:
    """Return (x, the operator's two arguments, bias), cast by the rules of autocast. x's columns are permuted.

    Raises:
        ValueError: the weight requires a gradient, which the operators do not compute.
    """
    if isinstance(weight, Tensor) and weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "weight requires grad, but this product computes no gradient for it. Pass weight.detach(), or freeze it: "
            "weight.requires_grad_(False). To train it, use torch.nn.functional.linear"
        )
    device = "cpu" if x.is_meta else x.device.type  # as `autocast_device`, in less time
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
        if isinstance(weight, Tensor):
            weight = weight.to(x.dtype)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if isinstance(weight, Tensor):
        return x, [weight], [], bias
    if weight.permutation is not None:
        x = permuted(x, weight)
    return x, *weight.operands(), bias
