"""Sums of tensors that adapters trained, as the literature on merging models has them.

task arithmetic   Σ w_i t_i                                            (Ilharco et al. 2023, arXiv 2212.04089)
ties              trim, elect a sign, the mean of those that have it   (Yadav et al. 2023, arXiv 2306.01708)
dare              drop at random, scale what is left by 1 / density    (Yu et al. 2024, arXiv 2311.03099)
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
    """How `pruned_sum` thins tensors out, and sums them.

    Args:
        random: drop entries at random and scale those that are left; else keep those of the largest size.
        elects: sum, of each entry, those tensors alone that have the sign of most, and divide by their number.
        density: the share of entries that is kept, more than 0 and at most 1.
        majority: by which `elects` finds a sign: "total" of the sum of values, "frequency" of the sum of signs.
        generator: of the entries that are dropped; None: PyTorch's own.
    """

    random: bool
    elects: bool
    density: float
    majority: Majority = "total"
    generator: torch.Generator | None = None


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w_i t_i, of equal shapes."""
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)
    return total


def pruned_sum(tensors: Sequence[Tensor], weights: Sequence[float], how: Pruning) -> Tensor:
    """The sum of what is left of each; signs are elected among the tensors as they are, before they are weighted."""
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
    """The entries of the largest size, `density` of all; zero elsewhere."""
    if how.density == 1:
        return tensor
    flat = tensor.reshape(-1)
    kept = torch.topk(flat.abs(), int(how.density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view_as(tensor)


def _drop(tensor: Tensor, how: Pruning) -> Tensor:
    """Each entry with the probability `density`, divided by it; zero elsewhere."""
    if how.density == 1:
        return tensor
    mask = torch.bernoulli(torch.full_like(tensor, how.density), generator=how.generator)
    return tensor * mask / how.density
