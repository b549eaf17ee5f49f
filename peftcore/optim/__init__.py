"""Fused optimizers: one call per step for all parameters, with 32-bit or 8-bit state, in memory or paged.

    optimizer = peftcore.optim.PagedAdamW8bit(model.parameters(), lr=2e-4, budget="256MB")

They are ordinary `torch.optim.Optimizer`s: parameter groups, schedulers, closures, `GradScaler`, clipping, checkpoints.

It imports `ops`.
"""

from peftcore.optim.optimizers import (
    SGD as SGD,
    AdamW as AdamW,
    AdamW8bit as AdamW8bit,
    Lion as Lion,
    PagedAdamW as PagedAdamW,
    PagedAdamW8bit as PagedAdamW8bit,
    PagedLion as PagedLion,
    PagedSGD as PagedSGD,
)
from peftcore.optim.paging import PAGE_BYTES as PAGE_BYTES, PagedOptimizer as PagedOptimizer, bytes_of as bytes_of

# Names used by transformers' Trainer and `peftcore train`.
NAMES = {
    "adamw_8bit": AdamW8bit,
    "paged_adamw_32bit": PagedAdamW,
    "paged_adamw_8bit": PagedAdamW8bit,
    "lion_32bit": Lion,
    "paged_lion_32bit": PagedLion,
}
