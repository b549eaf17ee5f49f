"""Clipping of gradients. Those that ranks share out: tests/distributed/test_experts.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peftcore


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
