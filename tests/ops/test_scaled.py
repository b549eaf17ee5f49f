"""scaled: rounded once, gradients beside PyTorch's in float64, also where products are too small for fp16."""

import pytest
import torch

from peftcore import ops


@pytest.mark.parametrize(("shape", "behind"), [((3, 5, 7), 0), ((2, 7, 4, 3), 2), ((7, 4), 1), ((7,), 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_beside_float64(shape: tuple[int, ...], behind: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    x, dy = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)
    g = torch.randn(7, dtype=wide, requires_grad=True)
    y = ops.scaled(x, g, behind)
    assert y.dtype is dtype
    found = y, *torch.autograd.grad(y, (x, g), dy)
    exact = x.detach().double().requires_grad_(), g.detach().double().requires_grad_()
    product = exact[0] * exact[1].view(-1, *[1] * behind)
    wanted = product, *torch.autograd.grad(product, exact, dy.double())
    for ours, theirs in zip(found, wanted, strict=True):
        tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}.get(dtype, 1e-12)
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def test_small_products_of_fp16() -> None:
    x, g = torch.full((64, 2), 1e-4, dtype=torch.float16), torch.ones(2, requires_grad=True)
    ops.scaled(x, g).backward(torch.full((64, 2), 1e-4, dtype=torch.float16))
    torch.testing.assert_close(g.grad, torch.full((2,), 64e-8), rtol=1e-2, atol=0)


def test_gradients() -> None:
    x, g = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randn(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(ops.scaled, (x, g.requires_grad_()))
    assert torch.autograd.gradgradcheck(ops.scaled, (x, g))
    y = ops.scaled(x.detach(), g)
    (only,) = torch.autograd.grad(y.sum(), g)
    torch.testing.assert_close(only, x.detach().sum(0))
