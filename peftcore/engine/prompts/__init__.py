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

from collections.abc import Sequence

import torch
from torch import nn

from peftcore.engine.prompts.backbone import language_config
from peftcore.errors import PeftcoreError
from peftcore.plugin.architecture import Architecture
from peftcore.plugin.placements.placement import Placement


def checked_shape(
    model: nn.Module,
    architecture: Architecture,
    placement: Placement,
    dimensions: Sequence[str],
    known: tuple[int, ...] | None = None,
) -> tuple[int, ...]:
    """Return the shape of the result of a placement's adapter, which has these dimensions.

    Args:
        dimensions: their names, of which one is "tokens".
        known: the shape, if the adapter cannot be called to find out.

    Raises:
        PeftcoreError: the model has no token embedding, the dimensions differ, or no position is left for input.
    """
    kind = type(placement).__name__
    if architecture.embedding is None:
        raise PeftcoreError(
            f"{kind} needs a token embedding, and {type(model).__name__} declares none. A plugin's "
            "peftcore_architecture hook can name it"
        )
    with torch.no_grad():
        shape = tuple(placement.adapter().shape) if known is None else known
    if len(shape) != len(dimensions):
        raise PeftcoreError(
            f"the adapter of a {kind} must return [{', '.join(dimensions)}], found a tensor of shape {list(shape)}"
        )
    tokens = shape[dimensions.index("tokens")]
    context = getattr(language_config(model), "max_position_embeddings", None)
    if isinstance(context, int) and 0 < context <= tokens:
        raise PeftcoreError(
            f"a prompt of {tokens} tokens leaves no room for input: {type(model).__name__} has a context of "
            f"{context} tokens. Use fewer"
        )
    return shape
