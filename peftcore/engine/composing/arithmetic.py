"""Sums of trained tensors, after the literature on model merging.

task arithmetic   Σ w_i t_i                                            (Ilharco et al. 2023, arXiv 2212.04089)
ties              trim, elect a sign, average the values that have it   (Yadav et al. 2023, arXiv 2306.01708)
dare              drop at random, scale the rest by 1 / density        (Yu et al. 2024, arXiv 2311.03099)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Majority = Literal["total", "frequency"]


@dataclass(frozen=True)
class Pruning:
    """Options of `pruned_sum`.

    Args:
        random: drop entries at random and rescale the rest; otherwise keep the entries of largest magnitude.
        elects: for each entry, average only the tensors that have the majority sign.
        density: fraction of entries kept, in (0, 1].
        majority: how the majority sign is found: "total" sums values, "frequency" sums signs.
        generator: random generator for dropping entries; None for PyTorch's default.
    """

    random: bool
    elects: bool
    density: float
    majority: Majority = "total"
    generator: torch.Generator | None = None


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return Σ w_i t_i of tensors of equal shape."""
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)
    return total


def pruned_sum(tensors: Sequence[Tensor], weights: Sequence[float], how: Pruning) -> Tensor:
    """Return the weighted sum of pruned tensors. Signs are elected before the weights are applied."""
    prune: Callable[[Tensor, Pruning], Tensor] = _drop if how.random else _trim
    left = [prune(tensor, how) for tensor in tensors]
    if not how.elects:
        return weighted_sum(left, weights)
    signs = torch.stack([tensor.sign() for tensor in left])
    total = signs.sum(0) if how.majority == "frequency" else torch.stack(left).sum(0)
    agrees = signs == torch.where(total >= 0, 1.0, -1.0)
    chosen = [tensor * mine for tensor, mine in zip(left, agrees, strict=True)]
    return weighted_sum(chosen, weights) / agrees.sum(0).clamp(min=1)


def _trim(tensor: Tensor, how: Pruning) -> Tensor:
    """Keep the fraction `density` of entries with the largest magnitude; zero the rest."""
    if how.density == 1:
        return tensor
    flat = tensor.reshape(-1)
    kept = torch.topk(flat.abs(), int(how.density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view_as(tensor)


def _drop(tensor: Tensor, how: Pruning) -> Tensor:
    """Keep each entry with probability `density` and divide it by `density`; zero the rest."""
    if how.density == 1:
        return tensor
    mask = torch.bernoulli(torch.full_like(tensor, how.density), generator=how.generator)
    return tensor * mask / how.density
