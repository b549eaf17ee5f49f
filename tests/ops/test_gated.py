"""gated and its gradients against float64 and PyTorch's activations, at every SIMD level, and its checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.nn import functional as F

from peftcore import ops
from peftcore.ops.gated import ACTIVATIONS, Gated, GatedBackward

_OPS = torch.ops.peftcore
STEP = {torch.float32: 2**-21, torch.bfloat16: 2**-8, torch.float16: 2**-11}
PYTORCH = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
NAMES: Any = pytest.mark.parametrize("name", list(ACTIVATIONS))


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


@NAMES
@pytest.mark.parametrize("dtype", STEP, ids=str)
@pytest.mark.parametrize("shape", [(9, 1), (3, 5, 66), (4, 1400), (512,), (0, 6), (1025,)], ids=str)
def test_against_float64(level: None, shape: tuple[int, ...], dtype: torch.dtype, name: Any) -> None:
    gate, up = (values(*shape, dtype=dtype, seed=seed).requires_grad_() for seed in (0, 1))
    y = ops.gated(gate, up, name)
    wide = [t.detach().double().requires_grad_() for t in (gate, up)]
    wanted = PYTORCH[name](wide[0]) * wide[1]
    assert y.dtype == dtype
    step = STEP[dtype]
    torch.testing.assert_close(y.double(), wanted, rtol=2.1 * step, atol=1e-6)  # rounded twice
    grad = values(*shape, dtype=dtype, seed=2)
    found = torch.autograd.grad(y, (gate, up), grad)
    for one, other in zip(found, torch.autograd.grad(wanted, wide, grad.double()), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2 * step, atol=1e-5)


@NAMES
@pytest.mark.parametrize("dtype", STEP, ids=str)
def test_gradients_are_not_less_exact_than_pytorchs(dtype: torch.dtype, name: Any) -> None:
    gate, up = (values(64, 600, dtype=dtype, seed=seed).requires_grad_() for seed in (0, 1))
    grad, wide = values(64, 600, dtype=dtype, seed=2), [t.detach().double().requires_grad_() for t in (gate, up)]
    wanted = torch.autograd.grad(PYTORCH[name](wide[0]) * wide[1], wide, grad.double())

    def errors(y: Tensor) -> list[float]:
        found = torch.autograd.grad(y, (gate, up), grad)
        return [float((g.double() - w).norm() / w.norm()) for g, w in zip(found, wanted, strict=True)]

    ours, theirs = errors(ops.gated(gate, up, name)), errors(PYTORCH[name](gate) * up)
    factor = 2.0 if dtype is torch.float32 else 1.02  # of 1e-7
    assert ours[0] <= factor * theirs[0] and ours[1] <= factor * theirs[1], (ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
def test_rounds_as_pytorch_does(level: None, dtype: torch.dtype, name: Any) -> None:
    gate, up = values(64, 600, dtype=dtype), values(64, 600, dtype=dtype, seed=1)
    y, wanted = ops.gated(gate, up, name), PYTORCH[name](gate) * up
    torch.testing.assert_close(y, wanted, rtol=2.1 * STEP[dtype], atol=1e-5)
    apart = (y.float() - wanted.float()).abs() > 1e-5  # PyTorch's GELU loses digits below -4, where it is next to 0
    assert apart.float().mean() < 3e-3


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 50), st.integers(1, 300), st.sampled_from([*STEP]), st.sampled_from(list(ACTIVATIONS)))
def test_kernel_and_formula_agree(rows: int, columns: int, dtype: Any, name: Any) -> None:
    gate, up = values(rows, columns, dtype=dtype), values(rows, columns, dtype=dtype, seed=1)
    y = ops.gated(gate, up, name)
    wanted = PYTORCH[name](gate.double()) * up.double()
    torch.testing.assert_close(y.double(), wanted, rtol=2.1 * STEP[dtype], atol=1e-6)


@NAMES
def test_far_out_values(level: None, name: Any) -> None:
    gate = torch.tensor([-3e38, -1e30, -1e4, -200.0, -88.5, 0.0, 88.5, 1e4, 1e30, float("inf"), float("nan")])
    one, powers = torch.ones(11), ACTIVATIONS[name]
    references = Gated(gate, one, *powers).compute(), *GatedBackward(one, gate, one, *powers).compute()
    for y, dgate, dup in (references, (ops.gated(gate, one, name), *_OPS.gated_backward(one, gate, one, *powers))):
        torch.testing.assert_close(y[:10], gate[:10].clamp(min=0), rtol=1e-6, atol=1e-34)
        torch.testing.assert_close(dup[:10], y[:10], rtol=0, atol=0)
        assert y[:4].eq(0).all() and y[:4].signbit().all()
        slope = torch.tensor([0, 0, 0, 0, 0, 0.5, 1, 1, 1])
        torch.testing.assert_close(dgate[:9], slope, rtol=1e-6, atol=1e-33)
        assert all(t[10].isnan() for t in (y, dgate, dup))


def test_second_gradients_and_transforms() -> None:
    pair = (
        values(3, 8, dtype=torch.float64).requires_grad_(),
        values(3, 8, dtype=torch.float64, seed=1).requires_grad_(),
    )
    assert torch.autograd.gradcheck(ops.gated, pair) and torch.autograd.gradgradcheck(ops.gated, pair)
    gate, up = values(3, 8).requires_grad_(), values(3, 8, seed=1)
    penalties = []
    for function in (ops.gated, lambda gate, up: F.silu(gate) * up):
        (dgate,) = torch.autograd.grad(function(gate, up).pow(2).sum(), gate, create_graph=True)
        penalties.append(torch.autograd.grad(dgate.pow(2).sum(), gate)[0])
    torch.testing.assert_close(penalties[0], penalties[1], rtol=1e-4, atol=1e-4)
    found = torch.func.grad(lambda gate: ops.gated(gate, up).sum())(gate.detach())
    torch.testing.assert_close(found, torch.autograd.grad(ops.gated(gate, up).sum(), gate)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("up", [lambda gate: gate, torch.sin], ids=["same", "dependent"])
def test_second_gradients_of_inputs_that_depend_on_each_other(up: Any) -> None:
    gate, penalties = values(3, 8).requires_grad_(), []
    for function in (ops.gated, lambda gate, up: F.silu(gate) * up):
        (dgate,) = torch.autograd.grad(function(gate, up(gate)).sum(), gate, create_graph=True)
        penalties.append((dgate.detach(), *torch.autograd.grad(dgate.pow(2).sum(), gate)))
    torch.testing.assert_close(*penalties, rtol=1e-4, atol=1e-4)


def test_keeps_its_inputs_alone() -> None:
    kept: list[Tensor] = []
    gate, up = values(8, 64).requires_grad_(), values(8, 64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.gated(gate, up)
    assert [t.data_ptr() for t in kept] == [gate.data_ptr(), up.data_ptr()]


def test_of_views_with_gaps() -> None:
    x = values(12, 40)
    gate, up = x[::2, 4:24], x[1::2, :20]
    assert torch.equal(ops.gated(gate, up), ops.gated(gate.contiguous(), up.contiguous()))


def test_opcheck() -> None:
    torch.library.opcheck(_OPS.gated, (values(4, 6), values(4, 6), 1.0, 0.1))
    torch.library.opcheck(_OPS.gated_backward, (values(4, 6), values(4, 6), values(4, 6), 1.0, 0.1))


@pytest.mark.parametrize(
    ("gate", "up", "error", "message"),
    [
        (torch.zeros(3, 5), torch.zeros(3, 4), ValueError, r"up must be \[3, 5\] like gate, found \[3, 4\]"),
        (torch.zeros(3), torch.zeros(3).half(), TypeError, "up must be (torch.float32|Float) like gate"),
        (torch.zeros(3).double(), torch.zeros(3).double(), TypeError, "only float32, float16 and bfloat16"),
    ],
    ids=str,
)
def test_checks(gate: Tensor, up: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"gated: {message}"):
        _OPS.gated(gate, up, 1.0, 0.0)
    with pytest.raises(error, match=f"gated_backward: {message}"):
        _OPS.gated_backward(gate, gate, up, 1.0, 0.0)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("name", ["linear", "cubic"])
def test_a_coefficient_that_no_activation_has_is_refused(name: str, number: float) -> None:
    x = torch.ones(3)
    coefficients = {"linear": 1.0, "cubic": 0.0, name: number}
    with pytest.raises(ValueError, match=f"gated: {name} must be from 0 to 16, found"):
        torch.ops.peftcore.gated(x, x, **coefficients)
    with pytest.raises(ValueError, match=f"gated_backward: {name} must be from 0 to 16, found"):
        torch.ops.peftcore.gated_backward(x, x, x, **coefficients)
