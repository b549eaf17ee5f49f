"""scaled at every SIMD level: rounded once, gradients beside float64, also where products are too small for fp16."""

import pytest
import torch

from peftcore import ops


@pytest.mark.parametrize(("shape", "behind"), [((3, 5, 7), 0), ((2, 7, 4, 3), 2), ((7, 4), 1), ((7,), 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_beside_float64(level: None, shape: tuple[int, ...], behind: int, dtype: torch.dtype) -> None:
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


def test_no_columns(level: None) -> None:
    x, g = torch.empty(3, 0, requires_grad=True), torch.empty(0, requires_grad=True)
    dx, dg = torch.autograd.grad(ops.scaled(x, g).sum(), (x, g))
    assert (dx.shape, dg.shape) == ((3, 0), (0,))


def test_gradients() -> None:
    x, g = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randn(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(ops.scaled, (x, g.requires_grad_()))
    assert torch.autograd.gradgradcheck(ops.scaled, (x, g))
    y = ops.scaled(x.detach(), g)
    (only,) = torch.autograd.grad(y.sum(), g)
    torch.testing.assert_close(only, x.detach().sum(0))


def test_sums_of_many_rows_and_columns(level: None) -> None:
    """In groups of rows and parts of columns; y is what rounding once gives, dg as exact as fp32 sums are."""
    torch.manual_seed(0)
    x, dy, g = torch.randn(3, 50, 1100).bfloat16(), torch.randn(3, 50, 1100).bfloat16(), torch.randn(1100)
    assert torch.equal(ops.scaled(x, g), (x.double() * g.double()).bfloat16())
    dx, dg = torch.ops.peftcore.scaled_backward(dy, x, g, [True, True])
    assert torch.equal(dx, (dy.double() * g.double()).bfloat16())
    torch.testing.assert_close(dg.double(), (dy.double() * x.double()).sum((0, 1)), rtol=1e-5, atol=1e-5)
    none, alone = torch.ops.peftcore.scaled_backward(dy, x, g, [False, True])
    assert none.numel() == 0 and torch.equal(alone, dg)


def test_opcheck() -> None:
    x, g = torch.randn(3, 40), torch.randn(40)
    torch.library.opcheck(torch.ops.peftcore.scaled, (x, g))
    torch.library.opcheck(torch.ops.peftcore.scaled_backward, (x, x, g, [True, False]))


@pytest.mark.parametrize(
    ("x", "g", "error", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2), ValueError, r"g must be \[3\] for x, found \[2\]"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), TypeError, "g must be a 16-, 32- or 64-bit"),
        (torch.zeros(2, 3), torch.zeros(3, device="meta"), ValueError, "g must be on cpu like x, found meta"),
        (torch.zeros(2, 3, dtype=torch.int8), torch.zeros(3), TypeError, "only float32, float16 and bfloat16"),
    ],
    ids=["size", "dtype", "device", "x"],
)
def test_checks(x: torch.Tensor, g: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"scaled: {message}"):
        torch.ops.peftcore.scaled(x, g)
