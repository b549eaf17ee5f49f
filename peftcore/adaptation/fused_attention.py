"""Modules whose calls of PyTorch's `scaled_dot_product_attention` are computed by `ops.attention`.

The module's own `forward` runs. Only that one function is replaced, and only where the arguments are ones that the
kernel takes: everything else about the module may be anything.

With gradients a mode watches the forward for the function. Without them, where a decoded token would wait for the mode,
it is replaced where transformers' modules look it up: in the table of attention functions, whose entry "sdpa" calls the
function that was there before for every module that is not fused.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from peftcore import ops
from peftcore.adaptation.base_modules import original_class
from peftcore.adaptation.fused_forward import FORMULA, Formula, computes_itself, plain, untransformed
from peftcore.ops.attention import has_attention_kernel

# Names that a forward which reaches the function mentions: PyTorch's own, and transformers' table of such functions.
_NAMES = frozenset({"scaled_dot_product_attention", "ALL_ATTENTION_FUNCTIONS"})
_LEAST_QUERIES = 16  # in fp32 without gradients: keys and values are arranged for the kernel
_ENTRY = "sdpa"  # of transformers' table
_REPLACED = "_peftcore_original"  # attribute of the function in the table: the one before
# Arguments that transformers' function for "sdpa" does not read, and others if they have these values.
_UNREAD = frozenset({"position_ids", "use_cache", "sliding_window", "cache_position", "is_causal"})
_WITHOUT_EFFECT = {"position_bias": None, "softcap": None, "output_attentions": False}


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
    if query.dtype is torch.float32 and query.shape[2] < _LEAST_QUERIES and not torch.is_grad_enabled():
        return None
    if query.shape[1] != key.shape[1] and not enable_gqa:
        return None
    return ops.attention(query, key, value, attn_mask, causal=is_causal, scale=scale, dropout_p=dropout_p)


def replace_in_table() -> None:
    """Let fused modules of transformers reach `ops.attention` in calls without gradients."""
    table: Any = getattr(sys.modules.get("transformers.modeling_utils"), "AttentionInterface", None)
    original = None if table is None else table._global_mapping.get(_ENTRY)
    if original is not None and not hasattr(original, _REPLACED):
        table.register(_ENTRY, _replaced(original))


def _replaced(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def interface(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not _is_fused_attention(module):
            return original(module, query, key, value, attention_mask, *args, **kwargs)
        if torch.is_grad_enabled() or computes_itself() or not untransformed():
            return original(module, query, key, value, attention_mask, *args, **kwargs)
        if not args and type(query) is Tensor and query.shape[2] == 1:
            output = _of_one_token(query, key, value, attention_mask, **kwargs)
            if output is not None:
                return output, None
        with _FastAttention():
            return original(module, query, key, value, attention_mask, *args, **kwargs)

    setattr(interface, _REPLACED, original)
    return interface


def _is_fused_attention(module: Any) -> bool:
    return isinstance(module, nn.Module) and type(module.__dict__.get(FORMULA)) is AttentionFormula


def _of_one_token(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> Tensor | None:
    """Return the attention `[batch, 1, heads, size]` of single queries, or None if transformers must compute it."""
    for name, given in others.items():
        if name not in _UNREAD and (name not in _WITHOUT_EFFECT or given is not _WITHOUT_EFFECT[name]):
            return None
    output = _attention(query, key, value, mask, dropout, scale=scaling, enable_gqa=True)
    return None if output is None else output.transpose(1, 2)
