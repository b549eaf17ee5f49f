"""Cross-entropy of a head a block of classes at a time, against float64, at every level."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore import ops
from peftcore.ops.cross_entropy import BLOCK_CLASSES, BLOCK_ROWS, CrossEntropyRows, has_blocks

_OPS = torch.ops.peftcore
PLAIN = [0.0, 1.0, 0.0, 0.0]
CLASSES = 2 * BLOCK_CLASSES + 37  # two blocks, and an odd number of classes
BF16, CPU = torch.bfloat16, torch.device("cpu")


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def operands(rows: int = 31, width: int = 50, classes: int = CLASSES) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(2))
    return values(rows, width), values(classes, width, seed=1) / 4, labels


def called(x: Tensor, w: Tensor, y: Tensor, *, bias: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    rest = options.get("weights"), options.get("scale"), options.get("settings", PLAIN)
    found: tuple[Tensor, Tensor] = _OPS.linear_cross_entropy_rows(x, w, bias, y, *rest, options.get("gradient", True))
    return found


def exact(x: Tensor, w: Tensor, y: Tensor, *, bias: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the same in float64, from logits rounded to bf16."""
    logits = F.linear(x.double(), w.double(), None if bias is None else bias.double()).to(BF16).double()
    weights, scale = (None if t is None else t.double() for t in (options.get("weights"), options.get("scale")))
    settings = options.get("settings", PLAIN)
    rows = CrossEntropyRows(logits, y, weights, scale, settings, -100, True).compute()
    return rows, logits @ w.double()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": values(CLASSES, seed=4), "scale": torch.tensor(0.25)},
        {"weights": torch.linspace(0.1, 2, CLASSES), "settings": [0.0, 0.5, 0.0, 1e-2]},
        {"settings": [0.0, 2.0, 5.0, 1e-3]},
        {"settings": [0.1, 1.0, 0.0, 0.0]},
    ],
    ids=["plain", "bias", "weights", "cap", "smoothing"],
)
@pytest.mark.parametrize("width", [1, 50, 160])
def test_against_float64(level: str, options: dict[str, Any], width: int) -> None:
    x, w, y = operands(width=width)
    y[::5] = -100
    (rows, grad), (exact_rows, exact_grad) = called(x, w, y, **options), exact(x, w, y, **options)
    # A logit that was rounded the other way is off by 2^-8 of itself.
    torch.testing.assert_close(rows.double(), exact_rows, rtol=2e-3, atol=2e-2)
    assert (grad.double() - exact_grad).norm() < 6e-3 * exact_grad.norm()
    assert grad[::5].count_nonzero() == 0
    assert rows[:, ::5].count_nonzero() == 0
    alone, nothing = called(x, w, y, gradient=False, **options)
    assert torch.equal(alone, rows)
    assert nothing.numel() == 0


def test_rows_of_several_groups(level: str) -> None:
    x, w, y = operands(BLOCK_ROWS + 3, 8, 300)
    (rows, grad), (exact_rows, exact_grad) = called(x, w, y), exact(x, w, y)
    torch.testing.assert_close(rows.double(), exact_rows, rtol=2e-3, atol=2e-2)
    assert (grad.double() - exact_grad).norm() < 6e-3 * exact_grad.norm()


@pytest.mark.parametrize("rising", [True, False])
def test_maxima_that_rise_from_block_to_block(level: str, rising: bool) -> None:
    """The gradient's sum has been scaled by what the maximum rose, by up to 80."""
    x, w, y = operands()
    order = torch.linspace(-40, 40, CLASSES).to(BF16)
    bias = order if rising else order.flip(0)
    (rows, grad), (exact_rows, exact_grad) = called(x, w, y, bias=bias), exact(x, w, y, bias=bias)
    torch.testing.assert_close(rows.double(), exact_rows, rtol=2e-3, atol=0.2)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=0.02, atol=0.02)


def test_no_less_exact_than_pytorch_where_the_label_is_certain(level: str) -> None:
    """With p of the label near 1, and the gradient a small difference: the label's row is not in a sum with others."""
    x, w, _ = operands(64, 96, 5000)
    y = F.linear(x, w).argmax(1)
    w[y] = (w[y] + x / 9).to(BF16)
    wide = x.double().requires_grad_()
    (wanted,) = torch.autograd.grad(F.cross_entropy(F.linear(wide, w.double()), y, reduction="sum"), wide)
    plain = x.clone().requires_grad_()
    (theirs,) = torch.autograd.grad(F.cross_entropy(F.linear(plain, w).float(), y, reduction="sum"), plain)
    ours = called(x, w, y)[1]
    certain = F.linear(wide, w.double()).softmax(1).gather(1, y[:, None])[:, 0] > 0.99
    assert certain.sum() > 20
    errors = [((grad.double() - wanted).norm(dim=1) / wanted.norm(dim=1))[certain].mean() for grad in (ours, theirs)]
    assert errors[0] < 1.05 * errors[1]


def test_values_that_are_not_finite(level: str) -> None:
    """A masked block has no probability, whichever it is; NaN and infinity make their row NaN alone."""
    x, w, y = operands(5)
    y[:] = BLOCK_CLASSES + 1
    for masked in (slice(0, BLOCK_CLASSES), slice(2 * BLOCK_CLASSES, None)):
        bias = torch.zeros(CLASSES, dtype=BF16)
        bias[masked] = -torch.inf
        (rows, grad), (exact_rows, exact_grad) = called(x, w, y, bias=bias), exact(x, w, y, bias=bias)
        torch.testing.assert_close(rows.double(), exact_rows, rtol=2e-3, atol=2e-2)
        assert (grad.double() - exact_grad).norm() < 6e-3 * exact_grad.norm()
    wanted = called(x, w, y)
    for bad in (torch.nan, torch.inf, -torch.inf):
        spoilt = x.clone()
        spoilt[2, 7] = bad
        rows, grad = called(spoilt, w, y)
        assert rows[:, 2].isnan().all()
        assert grad[2].isnan().all()
        others = torch.tensor([0, 1, 3, 4])
        assert torch.equal(rows[:, others], wanted[0][:, others])
        assert torch.equal(grad[others], wanted[1][others])
    for column in (0, BLOCK_CLASSES - 1, CLASSES - 1):  # a single class, whatever comes behind it
        bias = torch.zeros(CLASSES, dtype=BF16)
        bias[column] = torch.nan
        rows, grad = called(x, w, y, bias=bias)
        assert rows[:2].isnan().all()
        assert grad.isnan().all()
    y[3] = CLASSES
    assert called(x, w, y)[0][0].isnan().tolist() == [False, False, False, True, False]


def test_in_fp32_no_less_exact_than_pytorch(level: str) -> None:
    x, w, y = operands(200, 160)
    x, w, bias = x.float() + 0.01, w.float() - 0.01, values(CLASSES, seed=4).float() / 8
    y[::5] = -100
    wide = x.double().requires_grad_()
    losses = F.cross_entropy(F.linear(wide, w.double(), bias.double()), y, reduction="none")
    (wanted,) = torch.autograd.grad(losses.sum(), wide)
    plain = x.clone().requires_grad_()
    theirs = F.cross_entropy(F.linear(plain, w, bias), y, reduction="none")
    (their_grad,) = torch.autograd.grad(theirs.sum(), plain)
    rows, grad = called(x, w, y, bias=bias)
    torch.testing.assert_close(rows[0].double(), losses, rtol=2e-6, atol=2e-6)
    assert (rows[0] - losses).norm() <= 1.05 * (theirs - losses).norm()
    assert (grad - wanted).norm() <= 1.05 * (their_grad - wanted).norm() < 3e-6 * wanted.norm()
    few_rows, few_grad = called(x[:7], w, y[:7], bias=bias)  # multiplied by PyTorch
    torch.testing.assert_close(few_rows, rows[:, :7], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(few_grad, grad[:7], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_results_depend_on_no_thread_and_no_cache(level: str, dtype: torch.dtype) -> None:
    if ops.extension is None:
        pytest.skip("no _C: everything is a reference")
    x, w, y = operands(200, 160)
    x, w = x.to(dtype), w.to(dtype)
    wanted, caches, threads = called(x, w, y), ops.extension.caches(), torch.get_num_threads()
    if not has_blocks(dtype, CPU):
        pytest.skip("PyTorch's products may depend on threads")
    try:
        for sizes, count in (((32 << 10, 256 << 10, 1 << 20), 1), (caches, 3)):
            ops.extension.set_caches(*sizes)
            torch.set_num_threads(count)
            assert all(map(torch.equal, called(x, w, y), wanted))
    finally:
        ops.extension.set_caches(*caches)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_the_loss_of_a_head_takes_blocks(level: str, dtype: torch.dtype) -> None:
    x, w, y = operands(100)
    x, w = x.to(dtype), w.to(dtype)
    y[::3] = -100
    x.requires_grad_()
    loss = ops.linear_cross_entropy(x, w, y, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), x)
    # AVX-512 leaves 16-bit dtypes to PyTorch on processors that multiply them.
    if level == "avx2" or (level == "avx512" and dtype == torch.float32):
        assert has_blocks(dtype, CPU)
    if has_blocks(dtype, CPU):
        kept = y != -100
        rows, wanted = called(x.detach()[kept], w, y[kept])
        assert torch.equal(loss[kept], rows[0])
        assert torch.equal(grad[kept], wanted)
    assert grad[~(y != -100)].count_nonzero() == 0


def test_opcheck_and_checks() -> None:
    x, w, y = operands(9, 64, 50)
    torch.library.opcheck(_OPS.linear_cross_entropy_rows, (x, w, values(50), y, None, None, PLAIN))
    torch.library.opcheck(_OPS.linear_cross_entropy_rows, (x, w, None, y, None, None, [0.1, 1, 0, 0], False))
    with pytest.raises(ValueError, match=r"labels must be \[9\], found \[8\]"):
        called(x, w, y[:8])
    with pytest.raises(ValueError, match="weight must have a row for each class"):
        called(x, w[:0], y)
    with pytest.raises(ValueError, match="grad_scale must be one value"):
        called(x, w, y, scale=torch.ones(2))
    with pytest.raises(ValueError, match=r"must be \[rows, in\]"):
        called(x[None], w, y)
