"""Means of gradients over ranks, and clipping. Gradients that are sharded: tests/distributed/test_experts.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.distributed import gradients


@pytest.mark.parametrize("max_norm", [0.1, 100.0])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_whole_gradients_are_clipped_as_by_pytorch(max_norm: float, norm_type: float) -> None:
    found, wanted = ([nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2))] for _ in range(2))
    for parameters in (found, wanted):
        parameters[0].grad, parameters[1].grad = torch.tensor([3.0, -4.0, 0.5]), torch.full((2, 2), 2.0)
    norm = peftcore.distributed.clip_grad_norm_([nn.Parameter(torch.ones(1)), *found], max_norm, norm_type)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(wanted, max_norm, norm_type))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_without_gradients_the_norm_is_zero() -> None:
    assert peftcore.distributed.clip_grad_norm_([nn.Parameter(torch.ones(1))], 1.0) == 0


class _Failing(torch.autograd.Function):
    """Identity whose backward pass raises an error, as one that runs out of memory does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError("out of memory")


def test_gradients_are_averaged_after_a_backward_pass_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    averaged: list[float] = []
    replicated, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    monkeypatch.setattr(gradients.GradientMean, "average", lambda _: averaged.append(replicated.grad.item()))
    gradients.GradientMean([replicated], [])
    failing = _Failing.apply(other)  # made first, so that the backward pass reaches `replicated` before it
    with pytest.raises(RuntimeError, match="out of memory"):
        (failing + 2 * replicated).backward()
    assert replicated.grad.item() == 2 and averaged == []
    (replicated + 3 * replicated).backward()
    (5 * replicated).backward()
    assert averaged == [6, 11]
