"""Run the attention of transformers' modules by `ops.attention`.

transformers looks attention functions up by name in a table, `AttentionInterface`. The entry "sdpa" is replaced by a
function that runs `ops.attention` for supported calls of fused modules and the original function otherwise.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftcore import ops
from peftcore.engine.adaptation.fused_forward import FUSED_ATTENTION, plain
from peftcore.engine.adaptation.modes import numeric_check
from peftcore.model.base_modules import original_class
from peftcore.ops.attention import has_attention_kernel

_ENTRY = "sdpa"
_CLASSES = re.compile(r"\w*Attention\w*|\w+MLA")
_ORIGINAL = "_peftcore_original"  # attribute of the new entry: the replaced function
_LEAST_QUERIES = 16  # for fp32 without gradients, since the kernel first rearranges keys and values
# Parameters of transformers' function. A further parameter may change the result in an unknown way.
_PARAMETERS = {"module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal"}
_PARAMETERS |= {"position_bias", "cache", "kwargs"}


def calls_attention(module: nn.Module) -> bool:
    """Return whether `module` is an attention module of transformers that uses `sdpa`."""
    config = getattr(module, "config", None)
    return (
        _CLASSES.fullmatch(original_class(module).__name__) is not None
        and hasattr(module, "is_causal")
        and getattr(config, "_attn_implementation", None) == _ENTRY
    )


def replace_entry() -> bool:
    """Replace transformers' "sdpa" function once.

    Return whether transformers' "sdpa" entry now leads to `ops.attention`.
    """
    table: Any = getattr(sys.modules.get("transformers.modeling_utils"), "AttentionInterface", None)
    original = None if table is None else table._global_mapping.get(_ENTRY)
    if original is None:
        return False
    if not hasattr(original, _ORIGINAL):
        if not _PARAMETERS.issuperset(inspect.signature(original).parameters) or not _agrees(original):
            return False
        table.register(_ENTRY, _replacement(original))
    return True


def _replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def sdpa(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *args: Any, **kwargs: Any) -> Any:
        if not args and not torch.compiler.is_compiling() and getattr(module, FUSED_ATTENTION, False):
            output = _attention(module, query, key, value, attention_mask, **kwargs)
            if output is not None:
                return output, None
        return original(module, query, key, value, attention_mask, *args, **kwargs)

    setattr(sdpa, _ORIGINAL, original)
    return sdpa


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    softcap: float | None = None,
    output_attentions: bool | None = None,
    **_: Any,
) -> Tensor | None:
    """Return the attention `[batch, queries, heads, size]`; None if transformers must compute or reject it."""
    if position_bias is not None or softcap is not None or output_attentions or not 0 <= dropout < 1:
        return None
    if cache is not None:  # a paged cache, which transformers' function updates
        return None
    if not _has_fused_kernel(query, key, value, mask):
        return None
    queries = query.shape[2]
    # As in transformers: a single query sees all keys, and an explicit mask replaces the causal one.
    causal = queries > 1 and mask is None and bool(module.is_causal if is_causal is None else is_causal)
    if causal and key.shape[2] > queries:  # a static cache that is still empty after the prompt
        key, value = key[:, :, :queries], value[:, :, :queries]
    output = ops.attention(query, key, value, mask, causal=causal, scale=scaling, dropout_p=dropout)
    return output.transpose(1, 2).contiguous()


def _has_fused_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Return whether `ops.attention` supports this attention and is at least as fast as PyTorch."""
    if torch.is_autocast_enabled("cpu") or (mask is not None and type(mask) is not Tensor):
        return False
    if not plain(query, key) or not plain(value, query) or not has_attention_kernel(query, key, value, mask):
        return False
    few_queries = query.dtype is torch.float32 and query.shape[2] < _LEAST_QUERIES
    return torch.is_grad_enabled() or not few_queries


class _Module(nn.Module):
    is_causal = True
    num_key_value_groups = 2


def _agrees(original: Callable[..., Any]) -> bool:
    """Return whether transformers' function and ours give the same values on random input."""
    module = _Module()
    with numeric_check():
        query, key, value = (torch.randn(2, heads, 17, 32) for heads in (4, 2, 2))
        mask = torch.rand(2, 1, 17, 17) < 0.5
        mask[..., 0] = True
        cases: list[tuple[Tensor, Tensor | None, dict[str, Any]]] = [
            (query, None, {}),
            (query, None, {"is_causal": False, "scaling": 0.3}),
            (query, mask, {}),
            (query[:, :, :9], None, {}),
            (query[:, :, :1], None, {}),
        ]
        for q, case_mask, options in cases:
            output = _attention(module, q, key, value, case_mask, **options)
            expected = original(module, q, key, value, case_mask, **options)[0]
            if output is not None and not torch.allclose(output, expected, atol=1e-5):
                return False
    return True
