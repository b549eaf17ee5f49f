"""`torch.autocast` for the meta device, which PyTorch does not provide, with the casts of a CPU or a GPU.

The state and dtype of the CPU's autocast apply, so that gradient checkpointing restores them. The list of operators
comes from PyTorch's dispatcher. There are three kinds of casts:

    products      arguments to the 16-bit dtype
    a few more    arguments to the widest dtype among them
    all others    arguments to fp32, unless the call names a dtype

A trained parameter in fp32 is cast once per forward (autocast's cache). A frozen one is cast at every use; where a
gradient passes through, each copy stays until the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

KEY, _DEVICE = "AutocastIPU", "ipu"  # a device without its own kernels
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
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def autocast(precision: str | None) -> Iterator[None]:
    """Compute products in `bf16` or `fp16` within the block, which must be inside `on_meta`. None changes nothing."""
    if precision is None:
        yield
        return
    with torch.autocast("cpu", DTYPES[precision]):
        yield


def to_single(outputs: Any) -> Any:
    """Cast a forward's outputs to fp32, as accelerate does for a trainer."""
    return tree_map_only(Tensor, lambda t: t.float() if t.dtype in DTYPES.values() else t, outputs)


@contextmanager
def on_meta(on_card: bool) -> Iterator[None]:
    """Cast meta tensors within the block, by the state of the CPU's autocast and the operators of a CPU or a GPU."""
    library, other_library = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    other_library.fallback(torch.library.fallthrough_kernel, KEY)
    key = getattr(torch._C.DispatchKey, KEY)
    casts = _Casts(torch._C.DispatchKeySet(key))
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA" if on_card else "AutocastCPU"):
        namespace, _, operator = name.partition("::")
        if namespace == "aten":
            library.impl(operator, casts.kernel(operator), KEY)
    enabled = torch.is_autocast_enabled(_DEVICE)
    torch.set_autocast_enabled(_DEVICE, True)  # redirects to these kernels, which read the CPU's state
    try:
        with torch._C._IncludeDispatchKeyGuard(key):
            yield
    finally:
        torch.set_autocast_enabled(_DEVICE, enabled)
        library._destroy()
        other_library._destroy()


@contextmanager
def asked_of_cpu() -> Iterator[None]:
    """Make queries of the meta device's autocast state return the CPU's, within the block."""
    originals = torch.is_autocast_enabled, torch.get_autocast_dtype

    def as_on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *device: function(*("cpu" if each == "meta" else each for each in device))

    torch.is_autocast_enabled, torch.get_autocast_dtype = (as_on_cpu(function) for function in originals)
    try:
        yield
    finally:
        torch.is_autocast_enabled, torch.get_autocast_dtype = originals


class _Casts:
    """Substitutes for autocast's kernels."""

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
                    self.cache.clear()  # the forward under autocast has ended
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
    tensors: list[Tensor] = []
    tree_map_only(Tensor, tensors.append, (args, kwargs))
    if not any(_is_cast(t) and t.dtype == torch.float32 for t in tensors):
        return args, kwargs
    return tree_map_only(Tensor, _single, (args, kwargs))
