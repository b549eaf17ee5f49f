"""Cross-entropy and log-probabilities of a head without its logits, against PyTorch's in float64, at every level."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from support.levels import at_level
from torch import Tensor
from torch.nn import functional as F

from peftcore import ops
from peftcore.ops.cross_entropy import CrossEntropyRows
from peftcore.ops.linear_cross_entropy import PIECE_BYTES

_OPS = torch.ops.peftcore
# Logits are rounded to the head's dtype, as in its forward; gradients once more.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def labels_of(rows: int, classes: int, ignored: int = 3) -> Tensor:
    y = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(rows))
    y[::ignored] = -100
    return y


def exact(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    """Return the loss by PyTorch's operators."""
    z = F.linear(hidden, weight, bias) * logit_scale
    if soft_cap is not None:
        z = soft_cap * torch.tanh(z / soft_cap)
    weights = None if class_weight is None else class_weight.to(z.dtype)
    loss = F.cross_entropy(z, labels, weights, reduction=reduction, **options)
    counts = labels != options.get("ignore_index", -100)
    extra = z_loss * z.logsumexp(1) ** 2 * counts
    if reduction == "mean":
        total = counts.sum() if weights is None else weights[labels.where(counts, 0)].mul(counts).sum()
        return loss + extra.sum() / total
    return loss + (extra if reduction == "none" else extra.sum())


def gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Return the gradients for a weighted sum of the losses."""
    factors = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return list(torch.autograd.grad((loss * factors).sum(), inputs))


OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"class_weight": torch.linspace(0.1, 2, 300)},
    {"class_weight": torch.linspace(0.1, 2, 300), "label_smoothing": 0.2, "z_loss": 1e-2},
    {"logit_scale": 0.3},
    {"soft_cap": 5.0, "logit_scale": 2.0},
    {"soft_cap": 30.0, "label_smoothing": 0.1, "z_loss": 1e-3},
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_against_float64(level: str, reduction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PIECE_BYTES, "cpu", 1)  # pieces of 128 rows, or of 128 columns
    for options in OPTIONS:
        h, w = values(150, 24, dtype=dtype), values(300, 24, dtype=dtype, seed=1) / 4
        b, y = values(300, dtype=dtype, seed=2), labels_of(150, 300)
        given = [t.detach().requires_grad_() for t in (h, w, b)]
        wide = [t.detach().double().requires_grad_() for t in (h, w, b)]
        found = ops.linear_cross_entropy(*given[:2], y, bias=given[2], reduction=reduction, **options)
        wanted = exact(*wide[:2], y, bias=wide[2], reduction=reduction, **options)
        tolerance = TOLERANCE[dtype]
        assert found.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
        for one, other in zip(gradients(found, given), gradients(wanted, wide), strict=True):
            assert one.dtype == dtype
            torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_less_exact_than_pytorch(dtype: torch.dtype) -> None:
    """Loss and gradient are as near to float64 as those of PyTorch's logits in fp32, on average over five draws."""
    errors = {"ours": [0.0, 0.0], "theirs": [0.0, 0.0]}
    for seed in range(5):
        h, w = values(64, 96, dtype=dtype, seed=seed), values(5000, 96, dtype=dtype, seed=seed + 9) / 3
        y = labels_of(64, 5000)
        wide = h.double().requires_grad_()
        loss = F.cross_entropy(F.linear(wide, w.double()), y)
        (wanted,) = torch.autograd.grad(loss, wide)
        for name, sums in errors.items():
            x = h.clone().requires_grad_()
            ours = name == "ours"
            found = ops.linear_cross_entropy(x, w, y) if ours else F.cross_entropy(F.linear(x, w).float(), y)
            (grad,) = torch.autograd.grad(found, x)
            sums[0] += float((found.detach() - loss.detach()).abs())
            sums[1] += float((grad - wanted).norm() / wanted.norm())
    assert errors["ours"][0] <= errors["theirs"][0] + 1e-6  # the loss itself is fp32: 2.4e-7 for each draw
    assert errors["ours"][1] <= 1.02 * errors["theirs"][1]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 70),
    classes=st.integers(1, 600),
    width=st.sampled_from([1, 8, 33]),
    ignored=st.sampled_from([1, 2, 7, 100]),
    spread=st.sampled_from([0.1, 1.0, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    smoothing=st.sampled_from([0.0, 0.1]),
    cap=st.sampled_from([None, 4.0]),
    seed=st.integers(0, 9),
)
def test_the_kernel_against_its_reference(
    rows: int, classes: int, width: int, ignored: int, spread: float, dtype: Any, smoothing: float, cap: Any, seed: int
) -> None:
    logits = (spread * values(rows, classes, seed=seed)).to(dtype)
    y = labels_of(rows, classes, ignored)
    weights = values(classes, seed=3).abs() if seed % 2 else None
    scale = torch.tensor(0.25) if seed % 3 else None
    numbers = [smoothing, 1.5, cap or 0.0, 0.01 * (seed % 4)]
    kernel, reference = logits.clone(), logits.clone()
    found = _OPS.cross_entropy_rows_(kernel, y, weights, scale, numbers, -100, True)
    wanted = CrossEntropyRows(reference, y, weights, scale, numbers, -100, True).compute()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5 * max(1.0, spread))
    step = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(kernel, reference, rtol=2 * step, atol=1e-5 * spread)
    unread = logits.clone()
    assert torch.equal(_OPS.cross_entropy_rows_(unread, y, weights, scale, numbers, -100, False), found)
    assert torch.equal(unread, logits)


def test_levels_give_the_same_bits(level: str) -> None:
    logits, y = 9 * values(20, 700), labels_of(20, 700)
    found = _OPS.cross_entropy_rows_(one := logits.clone(), y, None, None, [0.1, 1.0, 7.0, 0.1], -100, True)
    with at_level("portable"):
        wanted = _OPS.cross_entropy_rows_(other := logits.clone(), y, None, None, [0.1, 1.0, 7.0, 0.1], -100, True)
    assert torch.equal(found, wanted) and torch.equal(one, other)


def test_values_that_are_not_finite(level: str) -> None:
    """As in PyTorch: masked logits have no probability, and NaN or infinity make their row NaN, at any place."""
    for place in (0, 3, 255, 256, 599):
        for bad in (float("nan"), float("inf"), float("-inf")):
            logits, y = values(3, 600), torch.tensor([1, 2, -100])
            logits[1, place] = bad
            wide = logits.clone().requires_grad_()
            wanted = F.cross_entropy(wide, y, reduction="none")
            (grad,) = torch.autograd.grad(wanted[:2].sum(), wide)
            found = _OPS.cross_entropy_rows_(logits, y, None, None, [0.0, 1.0, 0.0, 0.0], -100, True)
            torch.testing.assert_close(found[0], wanted.detach(), equal_nan=True)
            torch.testing.assert_close(logits, grad, equal_nan=True)
            if bad == float("-inf"):
                assert found.isfinite().all()
    masked = torch.full((1, 300), float("-inf"))
    assert _OPS.cross_entropy_rows_(masked, torch.tensor([0]), None, None, [0.0, 1.0, 0.0, 0.0], -100, True)[0].isnan()


def test_a_large_gap_between_logits(level: str) -> None:
    logits = torch.zeros(1, 900)
    logits[0, 500] = 300
    found = _OPS.cross_entropy_rows_(logits, torch.tensor([500]), None, None, [0.0, 1.0, 0.0, 0.0], -100, True)
    assert found[:, 0].tolist() == [0.0, 300.0, 0.0]
    assert logits.abs().max() == 0


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_head_in_4_bits(level: str, quant_type: str) -> None:
    packed = ops.quantize_4bit(values(130, 64, seed=1), quant_type)
    dense, y = ops.dequantize_4bit(packed).double(), labels_of(9, 130)
    x = values(9, 64).requires_grad_()
    wide = x.detach().double().requires_grad_()
    found, wanted = ops.linear_cross_entropy(x, packed, y), exact(wide, dense, y)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*gradients(found, [x]), gradients(wanted, [wide])[0].float(), rtol=1e-4, atol=1e-6)


def test_log_probabilities_and_entropies(level: str) -> None:
    h, w = values(2, 9, 16).requires_grad_(), values(200, 16, seed=1)
    tokens = torch.randint(200, (2, 9), generator=torch.Generator().manual_seed(0))
    found, entropies = ops.linear_log_probs(h, w, tokens, logit_scale=1 / 0.7)
    wide = h.detach().double().requires_grad_()
    z = (F.linear(wide, w.double()) / 0.7).log_softmax(-1)
    wanted = z.gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies, -(z.exp() * z).sum(-1).float().detach(), rtol=1e-4, atol=1e-5)
    assert not entropies.requires_grad
    torch.testing.assert_close(gradients(found, [h])[0].double(), *gradients(wanted, [wide]), rtol=1e-4, atol=1e-5)


def test_rows_without_labels_have_no_gradient_and_no_product() -> None:
    h, w = values(6, 8).requires_grad_(), values(40, 8)
    loss = ops.linear_cross_entropy(h, w, torch.full((6,), -100))
    assert loss.isnan()  # as in PyTorch
    assert torch.equal(*gradients(loss, [h]), torch.zeros(6, 8))
    assert ops.linear_cross_entropy(h, w, torch.full((6,), -100), reduction="sum") == 0
    y = torch.tensor([-100, 3, -100, 5, -100, -100])
    h.data[y < 0] = torch.nan  # never read
    loss = ops.linear_cross_entropy(h, w, y)
    assert loss.isfinite() and gradients(loss, [h])[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_rows(dtype: torch.dtype) -> None:
    h, w = torch.zeros(2, 0, 8, dtype=dtype, requires_grad=True), values(40, 8, dtype=dtype)
    y = torch.zeros(2, 0, dtype=torch.long)
    assert ops.linear_cross_entropy(h, w, y, reduction="none").shape == (2, 0)
    assert ops.linear_cross_entropy(h, w, y).isnan()  # as in PyTorch
    loss = ops.linear_cross_entropy(h, w, y, reduction="sum")
    assert loss == 0 and gradients(loss, [h])[0].shape == (2, 0, 8)


def test_gradcheck() -> None:
    h, w, b = (values(*s, dtype=torch.float64).requires_grad_() for s in ((5, 4), (7, 4), (7,)))
    y = torch.tensor([1, 6, -100, 0, 2])
    options = {"label_smoothing": 0.1, "soft_cap": 3.0, "z_loss": 0.1, "logit_scale": 0.8}
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda h, w, b, r=reduction: ops.linear_cross_entropy(h, w, y, bias=b, reduction=r, **options), (h, w, b)
        )
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(ops.linear_cross_entropy(h, w, y), h, create_graph=True)


def test_transforms_use_pytorch() -> None:
    h, w, y = values(5, 4), values(7, 4), torch.tensor([1, 6, -100, 0, 2])
    found = torch.func.grad(lambda h: ops.linear_cross_entropy(h, w, y, z_loss=0.1))(h)
    x = h.clone().requires_grad_()
    torch.testing.assert_close(found, *torch.autograd.grad(ops.linear_cross_entropy(x, w, y, z_loss=0.1), x))


def test_autocast_casts_as_the_head() -> None:
    h, w, y = values(9, 16).requires_grad_(), values(50, 16).requires_grad_(), labels_of(9, 50)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = ops.linear_cross_entropy(h, w, y), F.cross_entropy(F.linear(h, w), y)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for one, other in zip(torch.autograd.grad(found, (h, w)), torch.autograd.grad(wanted, (h, w)), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 * float(other.abs().max()))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch's own tracing does
@pytest.mark.parametrize("mean", [True, False])
def test_compiled(mean: bool) -> None:
    def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return ops.linear_cross_entropy(2 * h, w, y, reduction="mean" if mean else "none").sum()

    h, w, y = values(9, 16).requires_grad_(), values(50, 16).requires_grad_(), labels_of(9, 50)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, wanted = compiled(h, w, y), loss(h, w, y)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(torch.autograd.grad(found, (h, w)), torch.autograd.grad(wanted, (h, w)), strict=True):
        torch.testing.assert_close(one, other)


def test_opcheck() -> None:
    h, w, b, y = values(9, 64), values(50, 64), values(50), labels_of(9, 50)
    numbers = [0.1, 1.0, 5.0, 0.1]
    torch.library.opcheck(_OPS.cross_entropy_rows_, (h.clone(), y, None, torch.tensor(0.5), numbers, -100, True))
    torch.library.opcheck(_OPS.linear_cross_entropy, (h, [w], [], b, y, None, None, numbers, -100, True))
    packed = ops.quantize_4bit(w).operands()
    torch.library.opcheck(_OPS.linear_cross_entropy, (h, *packed, None, y, None, None, numbers, -100, False))
    rows, _ = _OPS.linear_cross_entropy(h, [w], [], b, y, None, None, numbers, -100, True)
    arguments = (h, w, b, y, None, rows[1], torch.ones(9), numbers, [True, True])
    torch.library.opcheck(_OPS.linear_cross_entropy_weight, arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"labels": torch.tensor([1, 50, 2])},
            IndexError,
            "labels must be from 0 to 49, or ignore_index .*found 50",
        ),
        ({"labels": torch.tensor([1, -1, 2])}, IndexError, "found -1"),
        ({"labels": torch.tensor([1, 2])}, ValueError, r"labels must be \[3\], found \[2\]"),
        ({"labels": torch.ones(3)}, TypeError, "labels must be torch.int64, found torch.float32"),
        ({"reduction": "average"}, ValueError, "reduction must be mean, sum or none, found 'average'"),
        ({"soft_cap": -1.0}, ValueError, "soft_cap must be positive, found -1"),
        ({"label_smoothing": 2.0}, ValueError, "label_smoothing must be from 0 to 1, found 2"),
        ({"class_weight": torch.ones(3)}, ValueError, r"class_weight must be \[50\], found \[3\]"),
        ({"weight": torch.ones(50, 7)}, ValueError, r"x must be \[.., 7\]"),
        ({"weight": torch.ones(50, 8).bfloat16()}, TypeError, "weight must be torch.float32 like x"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"hidden": values(3, 8), "weight": values(50, 8), "labels": torch.tensor([1, 2, 3]), **change}
    with pytest.raises(error, match=message):
        ops.linear_cross_entropy(given.pop("hidden"), given.pop("weight"), given.pop("labels"), **given)


def test_checks_of_the_kernel_and_its_reference() -> None:
    logits, y = values(3, 8), torch.tensor([1, 2, 3])
    for call in (_OPS.cross_entropy_rows_, CrossEntropyRows):
        with pytest.raises(ValueError, match="logits must be contiguous"):
            call(values(8, 3).t(), y, None, None, [0.0, 1.0, 0.0, 0.0], -100, True)
        with pytest.raises(ValueError, match=r"settings must be 4 numbers, found 2"):
            call(logits, y, None, None, [0.0, 1.0], -100, True)
        with pytest.raises(TypeError, match="class_weight must be"):
            call(logits, y, torch.ones(8).double(), None, [0.0, 1.0, 0.0, 0.0], -100, True)
        with pytest.raises(ValueError, match="grad_scale must be one value"):
            call(logits, y, None, torch.ones(2), [0.0, 1.0, 0.0, 0.0], -100, True)
    assert _OPS.cross_entropy_rows_(logits, torch.tensor([1, 8, 2]), None, None, [0.0, 1.0, 0.0, 0.0], -100, False)[
        0
    ].isnan().tolist() == [False, True, False]
