"""Handling of autocast, `torch.func` transforms and CUDA graphs, shared by the operators' public functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from peftcore.ops import _triton
from peftcore.ops.weight import PackedWeight


def operator_for(name: str, seed: torch.Tensor | None) -> Any:
    """Return the operator `name`, or its `_seeded` variant for a CPU seed in a compiled model (see `define_by`)."""
    seeded = seed is not None and seed.device.type == "cpu" and torch.compiler.is_compiling()
    return getattr(torch.ops.peftcore, f"{name}_seeded" if seeded else name)


def is_exporting() -> bool:
    """Return whether `torch.export` is tracing."""
    # torch.compiler.is_exporting() is also true in torch.compile of PyTorch 2.9.
    return torch.compiler._is_exporting_flag


def as_non_view(y: torch.Tensor) -> torch.Tensor:
    """Return `y` as a tensor that is not a view, to be returned by a `torch.autograd.Function`.

    Autograd forbids in-place changes to views that a custom function returns, but models make such changes: Llama 4
    adds in place to the output of its shared expert.
    """
    if torch.compiler.is_compiling() or not y._is_view():
        return y
    return torch.ops.aten._unsafe_view.default(y, y.shape)


def has_triton_kernels(device: torch.device) -> bool:
    """Return whether operators with Triton kernels have kernels on this device, on GPUs in Triton."""
    return device.type in _triton.DEVICES and (device.type != "cuda" or _triton.is_supported(device))


def has_active_transform() -> bool:
    """Return whether a transform of `torch.func` (vmap, grad, jvp) or a dual level of `forward_ad` is active.

    Transforms can only trace PyTorch's own operators.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def differentiable_gradients(
    formula: Callable[..., Tensor], inputs: Sequence[Tensor], needs: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Return gradients of formula(*inputs) that can be differentiated again, for `create_graph=True`.

    Gradients are taken with respect to views of the inputs: one input may be computed from another, or be the same
    tensor, and the gradient of an argument must not include paths through other arguments.

    Returns:
        A gradient for each input whose entry in `needs` is True, None for the others.
    """
    views = [t.view_as(t) for t in inputs]
    differentiated = [view for view, needs_grad in zip(views, needs, strict=True) if needs_grad]
    gradients = iter(torch.autograd.grad(formula(*views), differentiated, grad, create_graph=True))
    return [next(gradients) if needs_grad else None for needs_grad in needs]


def permute_inputs(t: Tensor, weight: Tensor | PackedWeight) -> Tensor:
    """Return `t` `[.., in]` (x, or A of a low-rank product) with its columns in the order of the weight's codes."""
    if isinstance(weight, Tensor) or weight.permutation is None:
        return t
    return t.index_select(-1, weight.permutation)


def autocast_device(x: Tensor) -> str:
    """Return the device type whose autocast applies to x.

    Meta tensors have no autocast of their own, so they use the CPU's.
    """
    return "cpu" if x.is_meta else x.device.type


def frozen_operands(
    x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None
) -> tuple[Tensor, list[Tensor], list[int], Tensor | None]:
    """Return x with permuted columns, the weight's two operator arguments, and the bias, cast as autocast requires.

    Raises:
        ValueError: the weight requires a gradient, which the operators do not compute.
    """
    if isinstance(weight, Tensor) and weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "weight requires grad, but this product computes no gradient for it. Pass weight.detach(), or freeze it: "
            "weight.requires_grad_(False). To train it, use torch.nn.functional.linear"
        )
    device = "cpu" if x.is_meta else x.device.type  # `autocast_device`, inlined because layers call this often
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
        if isinstance(weight, Tensor):
            weight = weight.to(x.dtype)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if isinstance(weight, Tensor):
        return x, [weight], [], bias
    if weight.permutation is not None:
        x = permute_inputs(x, weight)
    return x, *weight.operands(), bias
