"""silu(g) ∘ u and its gradient beside float64 at every SIMD level, and its checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore.ops.swiglu import swiglu

_OPS = torch.ops.peftcore
HALF_STEP = {torch.float32: 2**-21, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-12}  # and more


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (4 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def exact(x: Tensor) -> Tensor:
    gate, up = x.double().chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", HALF_STEP, ids=str)
@pytest.mark.parametrize("shape", [(9, 2), (3, 5, 66), (4, 1400), (512,), (2, 0), (0, 6)], ids=str)
def test_beside_float64(level: None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Rounded once: off by half a step of the dtype."""
    x = values(*shape, dtype=dtype).requires_grad_()
    y = swiglu(x)
    assert y.dtype == dtype
    step = HALF_STEP[dtype]
    torch.testing.assert_close(y.double(), exact(x.detach()), rtol=step, atol=1e-7)
    grad = values(*y.shape, dtype=dtype, seed=1)
    (dx,) = torch.autograd.grad(y, x, grad)
    wide = x.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(exact(wide), wide, grad.double())
    torch.testing.assert_close(dx.double(), wanted, rtol=2 * step, atol=2e-6)  # 1 - s is near 0 where s is near 1


def test_far_out_values_and_none(level: None) -> None:
    gate = torch.tensor([-1e4, -200.0, -88.5, -87.0, 0.0, 88.5, 1e4, float("inf"), float("nan")])
    y = _OPS.swiglu(torch.cat([gate, torch.ones(9)]))
    torch.testing.assert_close(y[:8], F.silu(gate[:8]), rtol=1e-6, atol=1e-33)
    assert y[8].isnan()
    dx = _OPS.swiglu_backward(torch.ones(9), torch.cat([gate, torch.ones(9)]))
    slope = torch.tensor([0, 0, 0, 0, 0.5, 1, 1])
    torch.testing.assert_close(dx[:7], slope, rtol=1e-6, atol=1e-30)
    assert dx[8].isnan() and dx[17].isnan()


def test_gradients_are_those_of_float64_and_only_the_first() -> None:
    x = values(3, 8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(swiglu, x)
    with pytest.raises(RuntimeError, match="swiglu cannot be differentiated twice"):
        torch.autograd.grad(swiglu(x := values(3, 8).requires_grad_()).sum(), x, create_graph=True)


def test_of_a_view_with_gaps() -> None:
    x = values(12, 40)
    assert torch.equal(swiglu(x[::2, 4:24]), swiglu(x[::2, 4:24].contiguous()))


def test_opcheck() -> None:
    torch.library.opcheck(_OPS.swiglu, (values(4, 6),))
    torch.library.opcheck(_OPS.swiglu_backward, (values(4, 3), values(4, 6)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3, 5),), ValueError, r"swiglu: x must be \[.., 2 n\], found \[3, 5\]"),
        ((torch.zeros(4, dtype=torch.float64),), TypeError, "swiglu: only float32, float16 and bfloat16"),
        ((torch.zeros(3, 4), torch.zeros(3, 4)), ValueError, r"grad must be \[3, 2\], found \[3, 4\]"),
        ((torch.zeros(3, 2).half(), torch.zeros(3, 4)), TypeError, "grad must be torch.float32 like x|Float like x"),
    ],
    ids=str,
)
def test_checks(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        (_OPS.swiglu if len(arguments) == 1 else _OPS.swiglu_backward)(*arguments)
