"""LoRA+ and LoRA-FA, which change how A and B are trained.

LoRA+     B learns `lora_plus_ratio` times as fast as A                (Hayou et al. 2024, arXiv 2402.12354)
LoRA-FA   A is frozen, and B's gradient g is replaced by g (A Aᵀ)⁻¹ / scale², whose change of scale · B A is the best
          approximation of the full weight's gradient                  (Zhang et al. 2023, arXiv 2308.03303)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftcore_lora.config import LoraConfig
from peftcore_lora.layers import LoraLinear


class LoraFrozenA(LoraLinear):
    """LoRA-FA: A is a buffer. The backward pass corrects B's gradient, so any optimizer can be used."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        a = self.lora_A.detach()
        del self.lora_A
        self.register_buffer("lora_A", a)

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, _CorrectGradient.apply(self.lora_B, self.lora_A, self.scale)  # type: ignore[no-untyped-call]


class _CorrectGradient(torch.autograd.Function):
    """Identity of B `[out, r]`, with the gradient g replaced by g (A Aᵀ)⁻¹ / scale²."""

    @staticmethod
    def forward(ctx: Any, b: Tensor, a: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(a)
        ctx.scale = scale
        return b.view_as(b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (a,) = ctx.saved_tensors
        a = a.float()
        gram = a @ a.T + 1e-8 * torch.eye(len(a), device=a.device)  # as in PEFT: stays invertible if A lacks rank
        corrected = torch.linalg.solve(gram, grad.float().T).T
        return (corrected / ctx.scale**2).to(grad.dtype), None, None


def parameter_groups(
    adapters: Mapping[str, Any], config: LoraConfig, lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Return LoRA+'s parameter groups with a higher learning rate: B, and B's bias without weight decay."""
    ratio = config.lora_plus_ratio
    if ratio is None:
        return []
    named_parameters = [(name, p) for adapter in adapters.values() for name, p in adapter.named_parameters()]
    b_factors = {id(p): p for name, p in named_parameters if name.rpartition(".")[2] == "lora_B"}
    # By id, so that a parameter that two adapters share enters once.
    b_biases = {id(p): p for name, p in named_parameters if name.rpartition(".")[2] == "lora_bias"}
    return [
        {"params": list(b_factors.values()), "lr": ratio * lr, "weight_decay": weight_decay},
        {"params": list(b_biases.values()), "lr": ratio * lr, "weight_decay": 0.0},
    ]
