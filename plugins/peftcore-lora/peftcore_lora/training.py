"""Training of A and B other than by AdamW with one learning rate.

LoRA+     B learns `lora_plus_ratio` times as fast as A                (Hayou et al. 2024, arXiv 2402.12354)
LoRA-FA   A is frozen, and B's gradient is the best approximation of the full weight's gradient:
          g (A Aᵀ)⁻¹ / scale²                                          (Zhang et al. 2023, arXiv 2308.03303)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftcore_lora.config import LoraConfig
from peftcore_lora.layers import LoraLinear


class LoraFrozenA(LoraLinear):
    """LoRA-FA: A is a buffer. The projection is a part of the gradient, so it works with any optimizer."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        a = self.lora_A.detach()
        del self.lora_A
        self.register_buffer("lora_A", a)

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, _Projected.apply(self.lora_B, self.lora_A, self.scale)  # type: ignore[no-untyped-call]


class _Projected(torch.autograd.Function):
    """B, with its gradient g replaced by g (A Aᵀ)⁻¹ / scale²."""

    @staticmethod
    def forward(ctx: Any, b: Tensor, a: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(a)
        ctx.scale = scale
        return b.view_as(b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (a,) = ctx.saved_tensors
        a = a.float()
        square = a @ a.T + 1e-8 * torch.eye(len(a), device=a.device)
        solved = torch.linalg.solve(square, grad.float().T).T
        return (solved / ctx.scale**2).to(grad.dtype), None, None


def parameter_groups(
    adapters: Mapping[str, Any], config: LoraConfig, lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Return LoRA+'s groups with a larger learning rate: B, and its bias, which has no weight decay."""
    ratio = config.lora_plus_ratio
    if ratio is None:
        return []
    named = [(name, p) for adapter in adapters.values() for name, p in adapter.named_parameters()]
    faster = {id(p): p for name, p in named if name.rpartition(".")[2] == "lora_B"}
    biases = {id(p): p for name, p in named if name.rpartition(".")[2] == "lora_bias"}
    return [
        {"params": list(faster.values()), "lr": ratio * lr, "weight_decay": weight_decay},
        {"params": list(biases.values()), "lr": ratio * lr, "weight_decay": 0.0},
    ]
