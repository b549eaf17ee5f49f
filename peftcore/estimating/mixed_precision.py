"""`torch.autocast` on the meta device, which PyTorch does not have: what it casts on a CPU or a card is cast here, too.

Whether autocast is on, and in which dtype, is what the CPU's says, so that a checkpoint that computes again restores it
as it does for others. Which operators it knows is asked of PyTorch's dispatcher; what it does is one of three:

    products      arguments to the 16 bits
    a few more    arguments to the widest dtype among them
    all others    arguments to 32 bits, unless the call names a dtype

A parameter in fp32 that is trained is cast once a forward (autocast's cache); a frozen one at every use, and where a
gradient passes by, each copy stays until the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

KEY, _DEVICE = "AutocastIPU", "ipu"  # of a device that nobody has, so that no other kernels stand in its place
# ATen/autocast_mode.h of PyTorch 2.13.
_PRODUCTS = {
    "_convolution", "conv1d", "conv2d", "conv3d", "conv_tbc", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "convolution", "cudnn_convolution", "cudnn_convolution_transpose", "prelu", "addmm", "addmv",
    "addr", "matmul", "einsum", "mm", "mv", "linalg_vecdot", "linear", "addbmm", "baddbmm", "bmm", "chain_matmul",
    "linalg_multi_dot", "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "lstm_cell", "gru_cell", "rnn_tanh_cell",
    "rnn_relu_cell", "mkldnn_rnn_layer", "_scaled_dot_product_flash_attention", "scaled_dot_product_attention",
    "_native_multi_head_attention",
}  # fmt: skip
_WIDEST = {
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler", "index_put", "tensordot",
    "scatter_add", "cat", "stack", "index_copy",
}  # fmt: skip
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def autocast(precision: str | None) -> Iterator[None]:
    """Within the block products are in 16 bits, `bf16` or `fp16`; None: nothing changes. In a block of `on_meta`."""
    if precision is None:
        yield
        return
    with torch.autocast("cpu", _DTYPES[precision]):
        yield


def to_single(outputs: Any) -> Any:
    """A forward's outputs in 32 bits, as accelerate gives them to a trainer."""
    return tree_map_only(Tensor, lambda t: t.float() if t.dtype in _DTYPES.values() else t, outputs)


@contextmanager
def on_meta(on_card: bool) -> Iterator[None]:
    """Within the block meta tensors are cast as the CPU's autocast says, by the CPU's list of operators or a card's."""
    library, others = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, KEY)
    key = getattr(torch._C.DispatchKey, KEY)
    casts = _Casts(torch._C.DispatchKeySet(key))
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA" if on_card else "AutocastCPU"):
        namespace, _, operator = name.partition("::")
        if namespace == "aten":
            library.impl(operator, casts.kernel(operator), KEY)
    enabled = torch.is_autocast_enabled(_DEVICE)
    torch.set_autocast_enabled(_DEVICE, True)  # those kernels are reached; they ask the CPU's
    try:
        with torch._C._IncludeDispatchKeyGuard(key):
            yield
    finally:
        torch.set_autocast_enabled(_DEVICE, enabled)
        library._destroy()
        others._destroy()


@contextmanager
def asked_of_cpu() -> Iterator[None]:
    """Within the block there is an answer to what autocast does with meta tensors, which is the CPU's."""
    before = torch.is_autocast_enabled, torch.get_autocast_dtype

    def as_on_cpu(asked: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *device: asked(*("cpu" if each == "meta" else each for each in device))

    torch.is_autocast_enabled, torch.get_autocast_dtype = (as_on_cpu(asked) for asked in before)
    try:
        yield
    finally:
        torch.is_autocast_enabled, torch.get_autocast_dtype = before


class _Casts:
    """What stands in for autocast's kernels."""

    def __init__(self, keys: Any) -> None:
        self.keys = keys
        self.cache: dict[Tensor, Tensor] = {}

    def kernel(self, name: str) -> Callable[..., Any]:
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
        names = [argument.name for argument in operator._schema.arguments]
        at = names.index("dtype") if "dtype" in names else None

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(self.keys):
                if not torch.is_autocast_enabled("cpu"):
                    self.cache.clear()  # the forward in which it was on is over
                elif packet in _PRODUCTS:
                    args, kwargs = tree_map_only(Tensor, self._half, (args, kwargs))
                elif packet in _WIDEST:
                    args, kwargs = _widest(args, kwargs)
                elif at is None or (kwargs.get("dtype") is None and (len(args) <= at or args[at] is None)):
                    args, kwargs = tree_map_only(Tensor, _single, (args, kwargs))
                return operator(*args, **kwargs)

        return run

    def _half(self, tensor: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu")
        if not _is_cast(tensor) or tensor.dtype == dtype:
            return tensor
        keeps = tensor.requires_grad and tensor.is_leaf and tensor._base is None and tensor.dtype == torch.float32
        if not keeps or not torch.is_autocast_cache_enabled():
            return tensor.to(dtype)
        if tensor not in self.cache:
            self.cache[tensor] = tensor.to(dtype)
        return self.cache[tensor]


def _is_cast(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype != torch.float64


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if _is_cast(tensor) else tensor


def _widest(args: Any, kwargs: Any) -> Any:
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, (args, kwargs))
    if not any(_is_cast(t) and t.dtype == torch.float32 for t in found):
        return args, kwargs
    return tree_map_only(Tensor, _single, (args, kwargs))
