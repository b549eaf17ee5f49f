"""Rows of experts from tokens and back, beside float64 at every SIMD level, and their checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peftcore.ops.routing import Routing, combine_rows, gather_rows, route

_OPS = torch.ops.peftcore
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-12}


def pairs(tokens: int, k: int, experts: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(experts, generator=generator)[:k] for _ in range(tokens)])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_pairs_of_an_expert_stay_in_their_order_and_those_of_none_come_last() -> None:
    found = route(torch.tensor([[2, 0], [5, 2], [0, 4]]), 4)  # of experts from 4 on there are none here
    assert found.order.tolist() == [1, 4, 0, 3, 2, 5]
    assert found.places.tolist() == [[2, 0], [4, 3], [1, 5]]
    assert found.offsets.tolist() == [2, 2, 4, 4] and found.offsets.dtype is torch.int32


@pytest.mark.parametrize(("tokens", "k", "experts"), [(50, 3, 7), (1, 8, 128), (0, 2, 4), (4, 1, 1)])
def test_places_are_where_the_order_has_each_pair(tokens: int, k: int, experts: int) -> None:
    index = pairs(tokens, k, experts) if tokens else torch.empty(0, k, dtype=torch.int64)
    order, places, offsets = route(index.to(torch.int32), experts)
    assert torch.equal(order[places.view(-1)], torch.arange(tokens * k))
    expert = index.view(-1)[order]
    assert torch.equal(expert, expert.sort().values)
    assert offsets.tolist() == [int((expert <= e).sum()) for e in range(experts)]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_copies_and_their_gradient(level: None, dtype: torch.dtype) -> None:
    routing = route(pairs(20, 3, 7), 7)
    x = normal(20, 37).to(dtype).requires_grad_()
    found = gather_rows(x, routing)
    assert torch.equal(found, x.detach()[routing.order // 3])
    grad = normal(60, 37, seed=1).to(dtype)
    (dx,) = torch.autograd.grad(found, x, grad)
    wanted = grad.double()[routing.places].sum(1)
    assert dx.dtype == dtype
    torch.testing.assert_close(dx.double(), wanted, rtol=TOLERANCES[dtype], atol=1e-6)


@pytest.mark.parametrize("of_weights", ["as y", "fp32", "frozen"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("columns", [1, 37, 300])
def test_sums_and_their_gradients(level: None, columns: int, dtype: torch.dtype, of_weights: str) -> None:
    """Over a width that no vector divides; the weights in fp32 beside 16 bits give sums in fp32."""
    routing = route(pairs(20, 3, 7), 7)
    y = normal(60, columns).to(dtype).requires_grad_()
    w = normal(20, 3, seed=1).to(dtype if of_weights == "as y" else torch.float32)
    w.requires_grad_(of_weights != "frozen")
    found = combine_rows(y, w, routing)
    assert found.dtype == torch.promote_types(dtype, w.dtype)
    exact_y, exact_w = y.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    exact = torch.einsum("tk,tkn->tn", exact_w, exact_y[routing.places])
    atol = TOLERANCES[found.dtype] * 8
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=atol)
    grad = normal(20, columns, seed=2).to(found.dtype)
    leaves = (y, w) if w.requires_grad else (y,)
    wanted = torch.autograd.grad(exact, (exact_y, exact_w), grad.double())
    for leaf, d, exact_d in zip(leaves, torch.autograd.grad(found, leaves, grad), wanted, strict=False):
        assert d.dtype == leaf.dtype
        scale = float(exact_d.abs().max())
        torch.testing.assert_close(d.double(), exact_d, rtol=0, atol=2 * TOLERANCES[leaf.dtype] * scale)


def test_gradients_are_those_of_float64() -> None:
    routing = route(pairs(5, 2, 3), 3)
    x, w = normal(5, 4).requires_grad_(), normal(5, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: combine_rows(gather_rows(x, routing).sin(), w, routing), (x, w))
    x, w = (t.detach().float().requires_grad_() for t in (x, w))
    for y, leaf, name in (
        (gather_rows(x, routing), x, "gathered"),
        (combine_rows(normal(10, 4).float(), w, routing), w, "combined"),
    ):
        with pytest.raises(RuntimeError, match=f"{name} cannot be differentiated twice"):
            torch.autograd.grad(y.sum(), leaf, create_graph=True)


def test_results_do_not_depend_on_threads() -> None:
    routing = route(pairs(300, 4, 9), 9)
    y, w, grad = normal(1200, 260).bfloat16(), normal(300, 4, seed=1).bfloat16(), normal(300, 260, seed=2).bfloat16()

    def results() -> list[Tensor]:
        dy, dw = _OPS.combined_backward(grad, y, w, routing.order, [True, True])
        assert dy.dtype is dw.dtype is torch.bfloat16
        return [combine_rows(y, w, routing), dy, dw]

    threads, wanted = torch.get_num_threads(), results()
    torch.set_num_threads(3)
    try:
        assert all(map(torch.equal, results(), wanted))
    finally:
        torch.set_num_threads(threads)


def test_what_lies_with_gaps_or_is_of_no_column() -> None:
    routing = route(pairs(6, 2, 3), 3)
    y, w = normal(12, 10).float(), normal(6, 2, seed=1).float()
    torch.testing.assert_close(
        combine_rows(y.T.contiguous().T, w.T.contiguous().T, routing), combine_rows(y, w, routing)
    )
    assert combine_rows(y[:, :0], w, routing).shape == (6, 0)
    assert gather_rows(y[:6, :0], routing).shape == (12, 0)
    none = Routing(routing.order[:0], routing.places[:, :0], routing.offsets)
    assert torch.equal(combine_rows(y, w[:, :0], none), torch.zeros(6, 10))


CASES: dict[str, tuple[Any, ...]] = {
    "routed": (pairs(6, 2, 3), 3),
    "gathered": (torch.randn(6, 5), route(pairs(6, 2, 3), 3).order, 2),
    "combined": (torch.randn(12, 5), torch.rand(6, 2), route(pairs(6, 2, 3), 3).places),
    "combined_backward": (
        *(torch.randn(6, 5), torch.randn(12, 5), torch.rand(6, 2)),
        *(route(pairs(6, 2, 3), 3).order, [True, True]),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(_OPS, name), CASES[name])


@pytest.mark.parametrize(
    ("name", "at", "instead", "error", "message"),
    [
        ("routed", 0, torch.tensor([[0, -1]]), ValueError, "index must not be negative, found -1"),
        ("routed", 0, torch.zeros(4, dtype=torch.int64), ValueError, r"index must be \[tokens, k\], found \[4\]"),
        ("routed", 0, torch.zeros(2, 2), TypeError, "index must be"),
        ("gathered", 0, torch.zeros(6, 5, dtype=torch.int8), TypeError, "only float32, float16 and bfloat16"),
        ("gathered", 1, torch.tensor([12]), ValueError, "order must be from 0 to 11, found 12 to 12"),
        ("gathered", 2, 0, ValueError, "k must be positive, found 0"),
        ("combined", 0, torch.zeros(60), ValueError, r"y must have two dimensions, found \[60\]"),
        ("combined", 1, torch.zeros(6, 3), ValueError, r"weights must be \[6, 2\], found \[6, 3\]"),
        (
            "combined",
            1,
            torch.zeros(6, 2, dtype=torch.int64),
            TypeError,
            "weights must be float32, float16 or bfloat16",
        ),
        ("combined", 2, torch.full((6, 2), 12), ValueError, "places must be from 0 to 11, found 12 to 12"),
        ("combined_backward", 0, torch.zeros(7, 5), ValueError, r"grad must have 6 rows, found \[7, 5\]"),
        ("combined_backward", 1, None, TypeError, "y must be a tensor for the gradient of weights, found None"),
        ("combined_backward", 1, torch.zeros(12, 4), ValueError, r"y must be \[12, 5\], found \[12, 4\]"),
        ("combined_backward", 3, torch.zeros(5, dtype=torch.int64), ValueError, r"order must be \[12\], found \[5\]"),
    ],
    ids=str,
)
def test_checks(name: str, at: int, instead: Any, error: type[Exception], message: str) -> None:
    arguments = [*CASES[name][:at], instead, *CASES[name][at + 1 :]]
    with pytest.raises(error, match=f"{name}: {message}"):
        getattr(_OPS, name)(*arguments)
