"""Triton's kernel of cross_entropy_rows_, alone and in its callers, against float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from peftcore import ops
from peftcore.ops.cross_entropy import CrossEntropyRows

# NumPy warns in the interpreter: of infinite values, and of how Triton before 3.6 reads an integer.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*encountered in:RuntimeWarning", "ignore:Conversion of an array:DeprecationWarning"
)
_OPS = torch.ops.peftcore
DTYPES = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
INF = float("inf")
# label smoothing, scale, soft cap, z-loss
SETTINGS = {
    "plain": (0.0, 1.0, 0.0, 0.0),
    "smoothed": (0.1, 0.5, 0.0, 0.01),
    "capped": (0.2, 2.0, 5.0, 0.0),
}


def logits_of(rows: int, classes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (3 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(0))).to(dtype)


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 7, 900, 4097])
def test_against_float64(device: torch.device, classes: int, dtype: torch.dtype, weighted: bool, kind: str) -> None:
    logits, labels = logits_of(3, classes, dtype).to(device), torch.tensor([classes - 1, -100, 0], device=device)
    weight = torch.linspace(0.1, 1, classes, device=device) if weighted else None
    scale = torch.tensor(0.25, device=device) if weighted else None
    reference = logits.double()
    wide = [None if t is None else t.double() for t in (weight, scale)]
    expected = CrossEntropyRows(reference, labels, *wide, SETTINGS[kind], -100).compute()

    unchanged = logits.clone()
    rows = _OPS.cross_entropy_rows_(unchanged, labels, weight, scale, SETTINGS[kind], -100, False)
    assert torch.equal(unchanged, logits)
    assert torch.equal(_OPS.cross_entropy_rows_(logits, labels, weight, scale, SETTINGS[kind], -100, True), rows)

    torch.testing.assert_close(rows.double(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(logits.double(), reference, rtol=2 * DTYPES[dtype], atol=1e-6)


def test_labels_out_of_range_and_infinite_logits(device: torch.device) -> None:
    logits, labels = logits_of(4, 9).to(device), torch.tensor([0, 9, -1, 3], device=device)
    logits[0, 4:], logits[3, 5] = -INF, float("nan")
    expected = F.cross_entropy(logits[:1].double(), labels[:1])
    rows = _OPS.cross_entropy_rows_(logits, labels, None, None, SETTINGS["plain"], -100, True)
    torch.testing.assert_close(rows[0, 0].double(), expected, rtol=1e-6, atol=1e-6)
    assert rows[0].isnan().tolist() == [False, True, True, True]
    assert logits[0, 4:].eq(0).all() and logits[1:3].isnan().sum(1).tolist() == [1, 1]
    assert rows[2, 0].isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_functions_that_call_it(device: torch.device, dtype: torch.dtype) -> None:
    hidden, weight = logits_of(6, 8, dtype).to(device).requires_grad_(), logits_of(50, 8, dtype).to(device)
    labels = torch.tensor([3, -100, 49, 0, -100, 7], device=device)
    wide = hidden.detach().double().requires_grad_()
    logits = F.linear(wide, weight.double())
    if dtype is torch.bfloat16:
        logits = logits + (logits.detach().bfloat16().double() - logits.detach())  # rounded, as a head's are
    expected = F.cross_entropy(logits, labels, reduction="none")
    (of_float64,) = torch.autograd.grad(expected.sum(), wide)

    losses = ops.linear_cross_entropy(hidden, weight, labels, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), hidden)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    step = 2**-6 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(gradient.double(), of_float64, rtol=step, atol=step)
    of_logits = ops.cross_entropy(logits.detach().to(dtype), labels)
    torch.testing.assert_close(of_logits.double(), expected, rtol=1e-5, atol=1e-5)


def test_opcheck_and_checks_of_arguments(device: torch.device) -> None:
    logits, labels = logits_of(2, 5).to(device), torch.tensor([4, -100], device=device)
    torch.library.opcheck(_OPS.cross_entropy_rows_, (logits, labels, None, None, list(SETTINGS["capped"]), -100, True))
    with pytest.raises(ValueError, match=r"labels must be \[2\], found \[1\]"):
        _OPS.cross_entropy_rows_(logits, labels[:1], None, None, SETTINGS["plain"], -100, True)
    empty = _OPS.cross_entropy_rows_(logits[:0], labels[:0], None, None, SETTINGS["plain"], -100, True)
    assert empty.shape == (3, 0)


def test_logits_that_are_all_the_lowest_number(device: torch.device) -> None:
    """Models mask classes with it."""
    logits = torch.full((1, 6), torch.finfo(torch.float32).min, device=device)
    labels = torch.tensor([2], device=device)
    losses, lse, entropy = _OPS.cross_entropy_rows_(logits, labels, None, None, SETTINGS["plain"], -100, True)
    log = torch.tensor([6.0], device=device).log()
    torch.testing.assert_close((losses, entropy), (log, log))
    assert lse.isfinite().all()
    torch.testing.assert_close(logits[0], torch.tensor([1, 1, -5, 1, 1, 1], device=device) / 6)


def test_float64(device: torch.device) -> None:
    logits, labels = logits_of(2, 5).double().to(device), torch.tensor([4, 1], device=device)
    torch.testing.assert_close(ops.cross_entropy(logits, labels), F.cross_entropy(logits, labels, reduction="none"))
