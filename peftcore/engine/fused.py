"""Which modules of a model are computed by one operator each, and whether its loss has logits."""

from __future__ import annotations

from collections import Counter

from torch import nn

from peftcore.engine.adaptation.adapted import is_adapted
from peftcore.engine.adaptation.fused_attention import FUSED_ATTENTION
from peftcore.engine.adaptation.fused_forward import FUSED_FORWARD, is_fused
from peftcore.model.base_modules import base_modules

LOSS_HANDLES = "_peftcore_loss_handles"  # attribute of a model whose loss is computed without logits: its hooks


def fused_modules(model: nn.Module) -> dict[str, int]:
    """Return the number of fused modules by kind. Adapted norms, MLPs, activations and dropouts are not fused."""
    kinds = Counter[str]()
    for _, module in base_modules(model):
        if FUSED_ATTENTION in module.__dict__:
            kinds["attention"] += 1
        elif is_fused(module) and not is_adapted(module):
            kinds[module.__dict__[FUSED_FORWARD].kind] += 1
    return dict(sorted(kinds.items()))


def is_without_logits(model: nn.Module) -> bool:
    """Return whether the model computes the loss of its labels in training without logits."""
    return LOSS_HANDLES in model.__dict__
