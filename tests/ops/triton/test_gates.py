"""Triton's kernels of gated and swiglu and their gradients, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore import ops
from peftcore.ops.gated import ACTIVATIONS
from peftcore.ops.swiglu import swiglu

# NumPy warns in the interpreter: of infinite values, and of how Triton before 3.6 reads an integer.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*encountered in:RuntimeWarning", "ignore:Conversion of an array:DeprecationWarning"
)
_OPS = torch.ops.peftcore
STEP = {torch.float32: 2**-21, torch.bfloat16: 2**-8, torch.float16: 2**-11}
PYTORCH = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("name", list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", STEP, ids=str)
@pytest.mark.parametrize("shape", [(), (9, 1), (3, 5, 66), (2, 1400)], ids=str)
def test_gated(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, name: Any) -> None:
    gate, up = (values(*shape, dtype=dtype, seed=seed).to(device).requires_grad_() for seed in (0, 1))
    wide = [t.detach().double().requires_grad_() for t in (gate, up)]
    expected = PYTORCH[name](wide[0]) * wide[1]
    grad = values(*shape, dtype=dtype, seed=2).to(device)

    y = ops.gated(gate, up, name)
    gradients = torch.autograd.grad(y, (gate, up), grad)

    step = STEP[dtype]
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=2.1 * step, atol=1e-6)  # rounded twice
    for gradient, of_float64 in zip(gradients, torch.autograd.grad(expected, wide, grad.double()), strict=True):
        torch.testing.assert_close(gradient.double(), of_float64, rtol=2 * step, atol=1e-5)


@pytest.mark.parametrize("dtype", STEP, ids=str)
@pytest.mark.parametrize("shape", [(2,), (3, 5, 66), (3, 2600)], ids=str)
def test_swiglu(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = values(*shape, dtype=dtype).to(device).requires_grad_()
    wide = x.detach().double().requires_grad_()
    gate, up = wide.chunk(2, -1)
    expected = F.silu(gate) * up
    grad = values(*expected.shape, dtype=dtype, seed=2).to(device)

    y = swiglu(x)
    (dx,) = torch.autograd.grad(y, x, grad)

    step = STEP[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=step, atol=1e-6)
    (of_float64,) = torch.autograd.grad(expected, wide, grad.double())
    torch.testing.assert_close(dx.double(), of_float64, rtol=2 * step, atol=1e-5)


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_extreme_values(device: torch.device, name: Any) -> None:
    numbers = [-3e38, -1e30, -1e4, -200.0, -88.5, 0.0, 88.5, 1e4, 1e30, float("inf"), float("nan")]
    gate, one = torch.tensor(numbers, device=device), torch.ones(11, device=device)
    y, (dgate, dup) = ops.gated(gate, one, name), _OPS.gated_backward(one, gate, one, *ACTIVATIONS[name])
    torch.testing.assert_close(y[:10], gate[:10].clamp(min=0), rtol=1e-6, atol=1e-34)
    torch.testing.assert_close(dup[:10], y[:10], rtol=0, atol=0)
    assert y[:4].eq(0).all() and y[:4].signbit().all()
    slope = torch.tensor([0, 0, 0, 0, 0, 0.5, 1, 1, 1], device=device)
    torch.testing.assert_close(dgate[:9], slope, rtol=1e-6, atol=1e-33)
    assert all(t[10].isnan() for t in (y, dgate, dup))


def test_views_and_empty_tensors(device: torch.device) -> None:
    x = values(12, 40).to(device)
    gate, up = x[::2, 4:24], x[1::2, :20]
    assert torch.equal(ops.gated(gate, up), ops.gated(gate.contiguous(), up.contiguous()))
    assert torch.equal(swiglu(x[:, ::2]), swiglu(x[:, ::2].contiguous()))
    assert ops.gated(x[:0], x[:0]).shape == (0, 40) and swiglu(x[:, :0]).shape == (12, 0)


def test_opcheck_and_checks_of_arguments(device: torch.device) -> None:
    x = values(4, 6).to(device)
    torch.library.opcheck(_OPS.gated, (x, x + 1, 1.0, 0.1))
    torch.library.opcheck(_OPS.gated_backward, (x, x + 1, x + 2, 1.0, 0.1))
    torch.library.opcheck(_OPS.swiglu, (x,))
    torch.library.opcheck(_OPS.swiglu_backward, (x[:, :3].contiguous(), x))
    with pytest.raises(ValueError, match=r"gated: up must be \[4, 6\] like gate, found \[4, 3\]"):
        _OPS.gated(x, x[:, :3], 1.0, 0.0)
    with pytest.raises(ValueError, match=r"swiglu: x must be \[.., 2 n\], found \[4, 5\]"):
        _OPS.swiglu(x[:, :5])
