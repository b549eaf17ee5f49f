"""Steps of tiny models with and without lazy logits, and their comparison."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftcore

LABELS = tiny.TOKENS.masked_fill(tiny.TOKENS == 9, -100)


def step(model: nn.Module, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and all gradients of a training step."""
    model.train()
    model.zero_grad()
    torch.manual_seed(0)  # of dropout
    loss = model(input_ids=tiny.TOKENS, labels=LABELS, **inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]], tolerance: float) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=tolerance / 4, atol=tolerance / 4)
    assert one[1].keys() == other[1].keys() and one[1]
    for name, grad in one[1].items():
        torch.testing.assert_close(grad, other[1][name], rtol=0, atol=tolerance * float(grad.abs().max()), msg=name)


def adapted(model: nn.Module, **options: Any) -> nn.Module:
    peftcore.apply(model, "lora", r=4, **options)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "head" not in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def shifted(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits[..., :-1, :].contiguous().view(-1, 96), LABELS[:, 1:].reshape(-1))
