"""activated and its gradient against float64 and PyTorch's activations, at every SIMD level, and its checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore import ops
from peftcore.ops.activated import ACTIVATIONS, Activated, ActivatedBackward

_OPS = torch.ops.peftcore
STEP = {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-11}
PYTORCH = {
    "gelu": F.gelu,
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
NAMES: Any = pytest.mark.parametrize("name", list(ACTIVATIONS))


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


@NAMES
@pytest.mark.parametrize("dtype", STEP, ids=str)
def test_against_float64(level: None, dtype: torch.dtype, name: Any) -> None:
    for shape in ((3, 5, 66), (4, 2100), (), (0, 6)):
        x, grad = values(*shape, dtype=dtype).requires_grad_(), values(*shape, dtype=dtype, seed=1)
        y = ops.activated(x, name)
        wide = x.detach().double().requires_grad_()
        wanted = PYTORCH[name](wide)
        torch.testing.assert_close(y.double(), wanted, rtol=STEP[dtype], atol=1e-6)
        (found,), (slope,) = (
            torch.autograd.grad(each, of, g) for each, of, g in ((y, x, grad), (wanted, wide, grad.double()))
        )
        assert y.dtype is found.dtype is dtype
        torch.testing.assert_close(found.double(), slope, rtol=2 * STEP[dtype], atol=2e-6)


def test_gelu_keeps_its_digits_where_it_is_small(level: None) -> None:
    """PyTorch's kernel adds 1 to erf, which leaves no digit of Φ(-6)."""
    x = torch.linspace(-9, -1, 500)
    wanted = x.double() * 0.5 * torch.special.erfc(-x.double() * 0.5**0.5)
    torch.testing.assert_close(ops.activated(x).double(), wanted, rtol=1e-5, atol=0)


@NAMES
def test_values_far_out_and_not_finite(level: None, name: Any) -> None:
    x = torch.tensor([-torch.inf, -3e38, -1e4, -88, 88, 1e4, 1e38, torch.inf, torch.nan], requires_grad=True)
    y = ops.activated(x, name)
    torch.testing.assert_close(y[1:7], x[1:7].clamp(min=0), rtol=0, atol=1e-34)
    assert y[1:3].signbit().all()
    assert y[7] == torch.inf and not y[[0, 8]].isfinite().any()
    (dx,) = torch.autograd.grad(y, x, torch.ones(9))
    torch.testing.assert_close(dx[1:7], (x[1:7] > 0).float(), rtol=0, atol=1e-7)
    assert dx[8].isnan() and (name != "gelu" or dx[[0, 7]].isnan().all())


@NAMES
def test_gradients_of_gradients(name: Any) -> None:
    x = values(3, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.activated(x, name), (x,))
    x = values(3, 4).requires_grad_()
    for function in (lambda x: ops.activated(x, name), PYTORCH[name]):
        (dx,) = torch.autograd.grad(function(x).pow(2).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(dx.sum(), x)
        first = second if function is not PYTORCH[name] else first  # noqa: F821
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_checks() -> None:
    x = values(3, 4)
    torch.library.opcheck(_OPS.activated, (x, True, 1.0, 0.0))
    torch.library.opcheck(_OPS.activated_backward, (x, x, False, 1.0, 0.1))
    for call in (_OPS.activated, Activated):
        with pytest.raises(ValueError, match="activated: linear must be from 0 to 16, found 17"):
            call(x, False, 17.0, 0.0)
    for call in (_OPS.activated_backward, ActivatedBackward):
        with pytest.raises(ValueError, match=r"grad must be \[3, 4\] like x, found \[3\]"):
            call(x[:, 0], x, True, 1.0, 0.0)
        with pytest.raises(TypeError, match=r"activated_backward: grad must be .* like x, found"):
            call(x.half(), x, True, 1.0, 0.0)
