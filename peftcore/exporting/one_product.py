"""Convert an adapter to one low-rank product per module, as other programs store it: W + scale · B A."""

from __future__ import annotations

import torch
from torch import nn

from peftcore import engine
from peftcore.engine.composing import low_rank
from peftcore.errors import PeftcoreError
from peftcore.plugin import sharded
from peftcore.plugin.adapter import LowRank


def adapter_products(model: nn.Module, adapter: str, action: str) -> dict[str, LowRank]:
    """Return {path of a module: low-rank product} of an applied adapter.

    Args:
        model: the model.
        adapter: name of the adapter.
        action: the operation, for error messages, such as `be written as an adapter of llama.cpp`.

    Raises:
        PeftcoreError: the adapter does more than add low-rank products, or contains NaN or Inf.
    """
    engine.refuse_merged(engine.require_state(model), "export")
    engine.refuse_changed(model)
    sharded.refuse_sharded(model, "export")
    factors_by_path = low_rank.factors_of(model, adapter, action)
    if not factors_by_path:
        raise PeftcoreError(
            f"'{adapter}' cannot {action}: it does not change weights. Export an adapter of a method that does"
        )
    return {path: _one(model, adapter, path, factors, action) for path, factors in factors_by_path.items()}


def _one(model: nn.Module, adapter: str, path: str, factors: list[LowRank], action: str) -> LowRank:
    is_module = path in dict(model.named_modules())  # otherwise the path of a parameter, such as a stacked weight
    if len(factors) > 1 or factors[0].a.ndim != 2 or not is_module:
        raise PeftcoreError(
            f"'{adapter}' cannot {action}: it changes '{path}', which is neither a linear layer nor an embedding. Use "
            "an adapter that was trained without it"
        )
    (product,) = factors
    a, b = product.a.detach().float().cpu(), product.b.detach().float().cpu()
    if not bool(a.isfinite().all() and b.isfinite().all()):
        raise PeftcoreError(
            f"'{adapter}' contains NaN or Inf at '{path}', because training has diverged. Export an earlier checkpoint"
        )
    return LowRank(b.T, a.T, product.scale) if product.transposed else LowRank(a, b, product.scale)


def padded(product: LowRank, rank: int, scale: float) -> LowRank:
    """Return an equal product with this scale and rank, by padding with zeros."""
    missing_rank = rank - len(product.a)
    b = torch.nn.functional.pad(product.b * (product.scale / scale), (0, missing_rank))
    return LowRank(torch.nn.functional.pad(product.a, (0, 0, 0, missing_rank)), b, scale)
