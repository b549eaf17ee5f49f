"""Calls of operators that `estimating.rates` times to measure how fast a processor multiplies."""

from __future__ import annotations

from collections.abc import Callable

import torch

_OPS = torch.ops.peftcore


def over_dense(
    rows: int, size: int, dtype: torch.dtype, rank: int = 1
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return calls of x Wᵀ and of dy W with a dense frozen W `[size, size]`, x and dy `[rows, size]`.

    Both are those of a linear layer with an adapter. Its low-rank product of rank 1 is too small to count; with more,
    the second call has the gradients of A and B as well.
    """
    x, weight = torch.ones(rows, size, dtype=dtype), [torch.ones(size, size, dtype=dtype)]
    a, b = torch.ones(rank, size), torch.ones(size, rank)
    y, s = _OPS.lora_linear(x, weight, [], None, a, b, 1.0)
    needs = (True, rank > 1, rank > 1)
    return (
        lambda: _OPS.lora_linear(x, weight, [], None, a, b, 1.0),
        lambda: _OPS.lora_linear_backward(y, x, s, weight, [], a, b, needs, 1.0),
    )
