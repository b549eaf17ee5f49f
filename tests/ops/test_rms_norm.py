"""rms_norm and its gradients against float64 and the models' formulas, at every SIMD level, and its checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from peftcore import ops
from peftcore.ops.rms_norm import RmsNormBackward, _formula

_OPS = torch.ops.peftcore
STEP = {torch.float32: 2**-21, torch.bfloat16: 2**-8, torch.float16: 2**-11}
EPS = 1e-5


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(x: Tensor, weight: Tensor, offset: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * (offset + weight)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", STEP, ids=str)
@pytest.mark.parametrize("shape", [(9, 1), (3, 5, 66), (130, 40), (2, 576), (512,), (0, 6), (4, 1100)], ids=str)
def test_against_float64(level: None, shape: tuple[int, ...], dtype: torch.dtype, offset: float) -> None:
    x, weight = values(*shape, dtype=dtype).requires_grad_(), values(shape[-1], dtype=dtype, seed=1).requires_grad_()
    y = ops.rms_norm(x, weight, EPS, offset=offset, rounded=False)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    wanted = exact(*wide, offset)
    assert y.dtype == dtype
    step = STEP[dtype]
    torch.testing.assert_close(y.double(), wanted, rtol=step, atol=1e-7)
    grad = values(*shape, dtype=dtype, seed=2)
    found = torch.autograd.grad(y, (x, weight), grad)
    for one, other in zip(found, torch.autograd.grad(wanted, wide, grad.double()), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=2 * step, atol=3e-5 if dtype is torch.float32 else step)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("offset", "rounded"), [(0.0, True), (0.0, False), (1.0, False)])
def test_rounds_as_models_do(level: None, dtype: torch.dtype, offset: float, rounded: bool) -> None:
    """All but a few values are equal, and those are neighbours: the sum of squares has another order."""
    x, weight = values(64, 576, dtype=dtype), values(576, dtype=dtype, seed=1)
    y, wanted = ops.rms_norm(x, weight, EPS, offset=offset, rounded=rounded), _formula(x, weight, EPS, offset, rounded)
    torch.testing.assert_close(y, wanted, rtol=2 * STEP[dtype], atol=1e-7)
    assert (y != wanted).float().mean() < 1e-3


@pytest.mark.parametrize("rounded", [True, False])
def test_the_gradient_of_the_weight_is_by_normalized_values_rounded_as_in_the_forward_pass(
    level: None, rounded: bool
) -> None:
    x, weight = values(1, 576, dtype=torch.bfloat16), values(576)
    scale = _OPS.rms_norm(x, weight, EPS, 0.0, rounded)[1]
    grad = torch.ones_like(x)
    dweight = _OPS.rms_norm_backward(grad, x, weight, scale, 0.0, rounded, [False, True])[1]
    normalized = x[0].float() * scale
    assert torch.equal(dweight, normalized.bfloat16().float() if rounded else normalized)


def errors(gradients: Any, wanted: Any) -> list[float]:
    return [float((g.double() - w).norm() / w.norm()) for g, w in zip(gradients, wanted, strict=True)]


@pytest.mark.parametrize("dtype", STEP, ids=str)
def test_gradients_are_not_less_exact_than_pytorchs(dtype: torch.dtype) -> None:
    x, weight = values(64, 576, dtype=dtype).requires_grad_(), values(576, dtype=dtype, seed=1).requires_grad_()
    grad, wide = values(64, 576, dtype=dtype, seed=2), [t.detach().double().requires_grad_() for t in (x, weight)]
    wanted = torch.autograd.grad(exact(*wide, 0.0), wide, grad.double())
    ours = errors(torch.autograd.grad(ops.rms_norm(x, weight, EPS), (x, weight), grad), wanted)
    theirs = errors(torch.autograd.grad(_formula(x, weight, EPS, 0.0, True), (x, weight), grad), wanted)
    assert ours[0] <= 1.05 * theirs[0] and ours[1] <= 1.05 * theirs[1], (ours, theirs)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 70), st.integers(1, 700), st.sampled_from([*STEP]), st.sampled_from([*STEP]), st.booleans())
def test_kernel_and_reference_agree(rows: int, columns: int, dtype: Any, weight_dtype: Any, rounded: bool) -> None:
    x, weight = values(rows, columns, dtype=dtype), values(columns, dtype=weight_dtype, seed=1)
    y, scale = _OPS.rms_norm(x, weight, EPS, 0.5, rounded)
    torch.testing.assert_close(y, _formula(x, weight, EPS, 0.5, rounded), rtol=2 * STEP[dtype], atol=1e-5)
    wanted = torch.rsqrt(x.double().pow(2).mean(-1) + EPS)
    torch.testing.assert_close(scale.double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "x", [values(4, 3, 5).transpose(0, 1), torch.empty(3, 0), torch.empty(0, 5)], ids=["permuted", "columns", "rows"]
)
def test_gradients_of_the_reference(x: torch.Tensor) -> None:
    weight, scale = values(x.shape[-1], seed=1), values(x.shape[:-1].numel(), seed=2).abs()
    arguments = x, x, weight, scale, 0.0, False, [True, True]
    torch.testing.assert_close(RmsNormBackward(*arguments).compute(), _OPS.rms_norm_backward(*arguments))


def test_threads_give_the_same_bits(level: None) -> None:
    x, weight, grad = values(130, 576), values(576, seed=1), values(130, 576, seed=2)
    scale = _OPS.rms_norm(x, weight, EPS, 0.0, True)[1]
    dx, dweight = _OPS.rms_norm_backward(grad, x, weight, scale, 0.0, True, [True, True])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again = _OPS.rms_norm_backward(grad, x, weight, scale, 0.0, True, [True, True])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(dx, again[0]) and torch.equal(dweight, again[1])


def test_extreme_rows(level: None) -> None:
    x = torch.tensor([[0.0] * 20, [1e-30] * 20, [1e25] * 20, [float("inf")] + [1.0] * 19, [float("nan")] + [1.0] * 19])
    weight = torch.ones(20)
    torch.testing.assert_close(ops.rms_norm(x, weight, EPS), _formula(x, weight, EPS, 0.0, True), equal_nan=True)


def test_keeps_x_and_one_number_a_row() -> None:
    kept: list[Tensor] = []
    x, weight = values(8, 64, dtype=torch.bfloat16).requires_grad_(), values(64, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.rms_norm(x, weight, EPS)
    assert [(list(t.shape), t.dtype) for t in kept] == [
        ([8, 64], torch.bfloat16),
        ([64], torch.bfloat16),
        ([8], torch.float32),
    ]


def test_second_gradients() -> None:
    x, weight = values(3, 8, dtype=torch.float64).requires_grad_(), values(8, dtype=torch.float64).requires_grad_()

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return ops.rms_norm(x, weight, EPS)

    assert torch.autograd.gradcheck(norm, (x, weight)) and torch.autograd.gradgradcheck(norm, (x, weight))
    pair = values(3, 8).requires_grad_(), values(8).requires_grad_()
    penalties = []
    for function in (norm, lambda x, weight: _formula(x, weight, EPS, 0.0, True)):
        (dx,) = torch.autograd.grad(function(*pair).pow(3).sum(), pair[0], create_graph=True)
        penalties.append(torch.autograd.grad(dx.pow(2).sum(), pair))
    torch.testing.assert_close(penalties[0], penalties[1], rtol=1e-4, atol=1e-4)


def test_second_gradients_of_a_weight_computed_from_x() -> None:
    x, penalties = values(3, 8).requires_grad_(), []
    for function in (ops.rms_norm, lambda x, weight, eps: _formula(x, weight, eps, 0.0, True)):
        (dx,) = torch.autograd.grad(function(x, x.mean(0), EPS).sum(), x, create_graph=True)
        penalties.append((dx.detach(), *torch.autograd.grad(dx.pow(2).sum(), x)))
    torch.testing.assert_close(*penalties, rtol=1e-4, atol=1e-4)


def test_transforms_and_views() -> None:
    x, weight = values(12, 40), values(20)
    assert torch.equal(ops.rms_norm(x[::2, 4:24], weight, EPS), ops.rms_norm(x[::2, 4:24].contiguous(), weight, EPS))
    found = torch.func.grad(lambda x: ops.rms_norm(x, weight, EPS).pow(3).sum())(x[:, :20])
    x = x[:, :20].clone().requires_grad_()
    (wanted,) = torch.autograd.grad(ops.rms_norm(x, weight, EPS).pow(3).sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_opcheck() -> None:
    x, weight = values(4, 6), values(6)
    torch.library.opcheck(_OPS.rms_norm, (x, weight, EPS, 1.0, True))
    scale = values(4).abs()
    torch.library.opcheck(_OPS.rms_norm_backward, (values(4, 6), x, weight, scale, 1.0, True, [True, False]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3, 5), torch.zeros(4)), ValueError, r"rms_norm: weight must be \[5\] for x, found \[4\]"),
        ((torch.zeros(3, dtype=torch.float64), torch.zeros(3)), TypeError, "rms_norm: only float32, float16"),
        ((torch.zeros(3), torch.zeros(3, dtype=torch.int32)), TypeError, "weight must be float32, float16 or bfloat16"),
        ((torch.zeros(()), torch.zeros(1)), ValueError, "x must have at least one dimension, found a scalar"),
    ],
    ids=str,
)
def test_checks(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _OPS.rms_norm(*arguments, EPS, 0.0, True)
    x = arguments[0]
    scale = torch.zeros(x.shape[:-1].numel()) if x.dim() else torch.zeros(1)
    with pytest.raises(error, match=message.replace("rms_norm:", "rms_norm_backward:")):
        _OPS.rms_norm_backward(x, *arguments, scale, 0.0, True, [True, True])


def test_checks_of_the_gradient() -> None:
    x, weight = torch.zeros(3, 4), torch.zeros(4)
    with pytest.raises(ValueError, match=r"grad must be \[3, 4\] like x, found \[3, 2\]"):
        _OPS.rms_norm_backward(torch.zeros(3, 2), x, weight, torch.zeros(3), 0.0, True, [True, True])
    with pytest.raises(ValueError, match=r"scale must be \[3\], found \[2\]"):
        _OPS.rms_norm_backward(x, x, weight, torch.zeros(2), 0.0, True, [True, True])
    with pytest.raises(TypeError, match="scale must be Float"):
        _OPS.rms_norm_backward(x, x, weight, torch.zeros(3).half(), 0.0, True, [True, True])
