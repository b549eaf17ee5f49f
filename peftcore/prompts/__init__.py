"""Soft prompts and prefixes as adapters around the backbone: embeddings, mask, token types, positions and cache.

    SoftPrompt      p_1 … p_n  x_1 … x_m   before the first layer      mask  1 … 1  mask
    PrefixKV        k_1 … k_n  k(x_1) …    in every layer's attention  positions of x: n, n + 1, …

Both are inserted at prefill only, while the cache is empty; afterwards the cache holds them, and only the mask and
given positions grow. A soft prompt is removed from the output again, so labels, losses and heads above the backbone
need not know of it. The loss is over the same tokens as without a prompt: the first input token, which the prompt's
last vector predicts, is not included. Several may be active: soft prompts come in order of activation,
`[first, …, last, tokens]`, and prefixes likewise in the cache, before the soft prompts.
"""

from __future__ import annotations

import torch
from torch import nn

from peftcore.adaptation.call import asked
from peftcore.architecture import Architecture
from peftcore.errors import PeftcoreError
from peftcore.method import Around, PrefixKV, SoftPrompt
from peftcore.prompts.backbone import text_config
from peftcore.prompts.prefix import place_prefix
from peftcore.prompts.soft import place_soft_prompt

__all__ = ["compiled"]


def compiled(model: nn.Module, architecture: Architecture, placement: SoftPrompt | PrefixKV) -> list[Around]:
    """Return the placement as adapters around modules of `model`.

    Raises:
        PeftcoreError: the model has no token embedding or no cache, shapes do not fit, or no position is left for
            input.
    """
    kind = type(placement).__name__
    if architecture.embedding is None:
        raise PeftcoreError(
            f"{kind} needs a token embedding, and {type(model).__name__} declares none. A plugin's "
            "peftcore_architecture hook can name it"
        )
    shape = _shape(placement)
    wanted = "[tokens, hidden]" if isinstance(placement, SoftPrompt) else "[layers, 2, kv_heads, tokens, head_dim]"
    if len(shape) != wanted.count(",") + 1:
        raise PeftcoreError(f"the adapter of a {kind} must return {wanted}, found a tensor of shape {list(shape)}")
    tokens = shape[0] if isinstance(placement, SoftPrompt) else shape[3]
    context = getattr(text_config(model), "max_position_embeddings", None)
    if isinstance(context, int) and 0 < context <= tokens:
        raise PeftcoreError(
            f"a prompt of {tokens} tokens leaves no room for input: {type(model).__name__} has a context of "
            f"{context} tokens. Use fewer"
        )
    if isinstance(placement, SoftPrompt):
        return place_soft_prompt(model, architecture, placement.adapter, *shape)
    return place_prefix(model, architecture, placement.adapter, shape)


def _shape(placement: SoftPrompt | PrefixKV) -> tuple[int, ...]:
    """Return the shape of the adapter's result; for a soft prompt that of one row."""
    adapter = placement.adapter
    if isinstance(placement, SoftPrompt) and asked([adapter]) is not None:
        if placement.shape is None:
            raise PeftcoreError(
                f"{type(adapter).__name__} depends on the call (needs_call), so its shape is unknown beforehand. "
                "Give it to the placement: SoftPrompt(adapter, shape=(tokens, hidden))"
            )
        return placement.shape
    with torch.no_grad():
        return tuple(adapter().shape)
