"""Modules whose calls of PyTorch's `scaled_dot_product_attention` are computed by `ops.attention`.

The module's own `forward` runs. Only that one function is replaced, in training, and only where the arguments are ones
that the kernel takes: everything else about the module may be anything.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from peftcore import ops
from peftcore.adaptation.class_swap import original_class
from peftcore.adaptation.fused_forward import Formula, plain, untransformed
from peftcore.ops.attention import has_attention_kernel

# Names that a forward which reaches the function mentions: PyTorch's own, and transformers' table of such functions.
_NAMES = frozenset({"scaled_dot_product_attention", "ALL_ATTENTION_FUNCTIONS"})


def calls_attention(module: nn.Module) -> bool:
    """Return whether the code of the module's `forward` may call `scaled_dot_product_attention`."""
    cls: Any = original_class(module)
    return "forward" not in module.__dict__ and _mentions(cls)


@functools.cache
def _mentions(cls: Any) -> bool:
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    return code is not None and not _NAMES.isdisjoint(code.co_names)


@dataclass(frozen=True)
class AttentionFormula(Formula):
    """The module's own forward, in which `scaled_dot_product_attention` is computed by `ops.attention`."""

    def call(self, own: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the module's output."""
        if not torch.is_grad_enabled() or not untransformed():
            return own(module, *args, **kwargs)
        with _FastAttention():
            return own(module, *args, **kwargs)


class _FastAttention(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            output = _attention(*args, **(kwargs or {}))
            if output is not None:
                return output
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Return the attention, or None if PyTorch must compute it, or refuse it."""
    if not 0 <= dropout_p < 1 or not plain(query, key) or not plain(value, query) or torch.is_autocast_enabled("cpu"):
        return None
    if attn_mask is not None and (is_causal or type(attn_mask) is not Tensor or attn_mask.requires_grad):
        return None
    if not has_attention_kernel(query, key, value, attn_mask):
        return None
    if query.shape[1] != key.shape[1] and not enable_gqa:
        return None
    if not (query.requires_grad or key.requires_grad or value.requires_grad):
        return None
    return ops.attention(query, key, value, attn_mask, causal=is_causal, scale=scale, dropout_p=dropout_p)
