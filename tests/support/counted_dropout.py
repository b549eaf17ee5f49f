"""Dropout of PyTorch's own functions with the masks that `ops.dropout` and `ops.attention` draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from peftcore.ops.dropout import factor, keep_mask, new_seed

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class CountedDropout(TorchFunctionMode):
    """Block in which `F.dropout` and the dropout of `scaled_dot_product_attention` draw seeds as fused modules do."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Return what `func` returns, with another mask."""
        named = kwargs or {}
        if func is F.dropout:
            return _dropout(*args, **named)
        if func is F.scaled_dot_product_attention:
            return _attention(**dict(zip(_ARGUMENTS, args, strict=False)), **named)
        return func(*args, **named)


def _factors(shape: torch.Size, p: float, x: Tensor) -> Tensor:
    seed = new_seed(x)
    keep = keep_mask(shape[:-1].numel(), shape[-1], p, seed, x.device).view(shape)
    return keep * factor(1.0, p, seed)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or inplace or not 0 < p < 1 or input.dim() == 0 or not input.is_floating_point():
        return F.dropout(input, p, training, inplace)
    return (input * _factors(input.shape, p, input)).to(input.dtype)


def _attention(query: Tensor, key: Tensor, value: Tensor, **named: Any) -> Tensor:
    dropout_p, attn_mask, scale = named.get("dropout_p", 0.0), named.get("attn_mask"), named.get("scale")
    if not 0 < dropout_p < 1 or query.dim() != 4 or query.shape[0] != key.shape[0]:
        return F.scaled_dot_product_attention(query, key, value, **named)
    groups = query.shape[1] // key.shape[1]
    k, v = (t.repeat_interleave(groups, 1).float() for t in (key, value))
    scores = query.float() @ k.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if named.get("is_causal"):
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    p = scores.softmax(-1).nan_to_num(0)  # of queries that see no key
    return (p * _factors(p.shape, dropout_p, query) @ v).to(query.dtype)
