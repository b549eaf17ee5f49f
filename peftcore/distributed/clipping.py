"""Clipping of gradients of which some are whole on every rank and others divided."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from peftcore.plugin import ranks


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scale gradients so that their norm is at most `max_norm`, like `torch.nn.utils.clip_grad_norm_`. Collective.

    PyTorch's function fails where some parameters are DTensors and others are not, as with adapters on experts that the
    ranks share out and on other layers.

    Returns:
        The norm before, a plain tensor, equal on every rank.
    """
    gradients = [each.grad for each in parameters if each.grad is not None]
    groups: dict[object, list[Tensor]] = {}
    for gradient in gradients:
        groups.setdefault(gradient.device_mesh if ranks.is_dtensor(gradient) else None, []).append(gradient)
    norms = [torch.nn.utils.get_total_norm(group, norm_type, foreach=False) for group in groups.values()]
    if not norms:
        return torch.tensor(0.0)
    total = torch.linalg.vector_norm(torch.stack([ranks.whole(norm) for norm in norms]), norm_type)
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local = gradient.to_local() if ranks.is_dtensor(gradient) else gradient
        local.mul_(factor.to(local.device))
    return total
