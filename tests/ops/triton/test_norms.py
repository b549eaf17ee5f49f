"""Triton's kernels of rms_norm and its gradients, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftcore import ops
from peftcore.ops.rms_norm import RmsNormBackward, _formula

# NumPy warns in the interpreter: of infinite values, and of how Triton before 3.6 reads an integer.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*encountered in:RuntimeWarning", "ignore:Conversion of an array:DeprecationWarning"
)
_OPS = torch.ops.peftcore
STEP = {torch.float32: 2**-21, torch.bfloat16: 2**-8, torch.float16: 2**-11}
EPS = 1e-5


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# One row and many; narrow rows, several of which are one program's; and rows that do not fit a program's registers.
@pytest.mark.parametrize("shape", [(9, 1), (3, 5, 66), (130, 40), (512,), (70, 2), (1, 8195)], ids=str)
@pytest.mark.parametrize("dtype", STEP, ids=str)
def test_against_float64(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = values(*shape, dtype=dtype).to(device).requires_grad_()
    weight = values(shape[-1], dtype=dtype, seed=1).to(device).requires_grad_()
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = wide[0] * torch.rsqrt(wide[0].pow(2).mean(-1, keepdim=True) + EPS) * (1 + wide[1])
    grad = values(*shape, dtype=dtype, seed=2).to(device)

    y = ops.rms_norm(x, weight, EPS, offset=1.0, rounded=False)
    gradients = torch.autograd.grad(y, (x, weight), grad)

    step = STEP[dtype]
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=step, atol=1e-7)
    for gradient, of_float64 in zip(gradients, torch.autograd.grad(expected, wide, grad.double()), strict=True):
        assert gradient.dtype == dtype
        atol = 3e-5 if dtype is torch.float32 else step
        torch.testing.assert_close(gradient.double(), of_float64, rtol=2 * step, atol=atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rounded", [True, False])
def test_rounds_as_models_do(device: torch.device, dtype: torch.dtype, rounded: bool) -> None:
    """All but a few values are equal, and those are neighbours: the sum of squares has another order."""
    x, weight = values(16, 576, dtype=dtype).to(device), values(576, seed=1).to(device)
    y, expected = ops.rms_norm(x, weight, EPS, rounded=rounded), _formula(x, weight, EPS, 0.0, rounded)
    torch.testing.assert_close(y, expected, rtol=2 * STEP[dtype], atol=1e-7)
    assert (y != expected).float().mean() < 1e-3
    scale = _OPS.rms_norm(x, weight, EPS, 0.0, rounded)[1]
    dweight = _OPS.rms_norm_backward(torch.ones_like(x), x, weight, scale, 0.0, rounded, [False, True])[1]
    normalized = x.float() * scale[:, None]
    normalized = normalized.to(dtype).float() if rounded else normalized
    torch.testing.assert_close(dweight, normalized.sum(0), rtol=1e-5, atol=1e-5)


def test_extreme_rows(device: torch.device) -> None:
    rows = [[0.0] * 20, [1e-30] * 20, [1e25] * 20, [float("inf")] + [1.0] * 19, [float("nan")] + [1.0] * 19]
    x, weight = torch.tensor(rows, device=device), torch.ones(20, device=device)
    torch.testing.assert_close(ops.rms_norm(x, weight, EPS), _formula(x, weight, EPS, 0.0, True), equal_nan=True)


def test_views_and_empty_tensors(device: torch.device) -> None:
    view = values(4, 3, 10).to(device).transpose(0, 1)[..., ::2]
    for x in (view, torch.empty(3, 0, device=device), torch.empty(0, 5, device=device)):
        weight, scale = torch.ones(x.shape[-1], device=device), values(x.shape[:-1].numel(), seed=2).to(device).abs()
        y = ops.rms_norm(x, weight, EPS)
        torch.testing.assert_close(y, _formula(x, weight, EPS, 0.0, True))
        arguments = x, x, weight, scale, 0.0, False, [True, True]
        torch.testing.assert_close(_OPS.rms_norm_backward(*arguments), RmsNormBackward(*arguments).compute())


def test_many_groups_of_rows(device: torch.device) -> None:
    """More rows than groups of 64: each group then has 128."""
    x, grad = values(8200, 3).to(device), values(8200, 3, seed=1).to(device)
    weight, scale = torch.ones(3, device=device), torch.ones(8200, device=device)
    dweight = _OPS.rms_norm_backward(grad, x, weight, scale, 0.0, False, [False, True])[1]
    torch.testing.assert_close(dweight.double(), (x.double() * grad.double()).sum(0), rtol=1e-5, atol=1e-4)


def test_opcheck_and_checks_of_arguments(device: torch.device) -> None:
    x, weight = values(4, 6).to(device), values(6, seed=1).to(device)
    scale = values(4).to(device).abs()
    torch.library.opcheck(_OPS.rms_norm, (x, weight, EPS, 1.0, True))
    torch.library.opcheck(_OPS.rms_norm_backward, (x, x, weight, scale, 1.0, True, [True, False]))
    with pytest.raises(ValueError, match=r"rms_norm: weight must be \[6\] for x, found \[4\]"):
        _OPS.rms_norm(x, weight[:4], EPS, 0.0, True)
    with pytest.raises(TypeError, match="rms_norm: only float32, float16"):
        _OPS.rms_norm(x.double(), weight, EPS, 0.0, True)
