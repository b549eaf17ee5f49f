"""Routing of tokens to the rows of experts and back: sorting, gathering, and weighted sums.

    e[t, j]      the experts of token t, for j < k                 order = the pairs (t, j), as t k + j, sorted by e
    x_i          = the token of pair order[i]                      places[t, j] = the row i of pair (t, j)
    y_t          = Σ_j w[t, j] y[places[t, j]]

Sums are fp32, rounded once. The gradient of gathering is such a sum with w = 1, and the gradient of a sum is weighted
gathering, so the order of additions never depends on threads, as it does in PyTorch's `index_put`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore.ops._library import define_by
from peftcore.ops.weight import DTYPES, check_dtype, check_strided, check_tensor, require

_OPS = torch.ops.peftcore


class Routing(NamedTuple):
    """Rows sorted by expert.

    Args:
        order: int64 `[tokens · k]`, the pair of each row; the sort is stable.
        places: int64 `[tokens, k]`, the row of each pair.
        offsets: int32 `[experts]`, the end of each expert's rows.
    """

    order: Tensor
    places: Tensor
    offsets: Tensor


def _check_int64(t: Tensor, like: Tensor, op: str, name: str) -> None:
    check_tensor(t, torch.int64, like.device, op, name)
    check_strided(t, op, name)


def _check_x(t: Tensor, op: str, name: str) -> None:
    check_dtype(t.dtype, op)
    check_strided(t, op, name)
    require(t.dim() == 2, op, f"{name} must have two dimensions, found {list(t.shape)}")


def _check_numbers(t: Tensor, op: str, name: str, count: int) -> None:
    """Check that all values are from 0 to count - 1. Only done on CPU, since a GPU would have to synchronize."""
    if t.device.type == "cpu" and t.numel():
        low, high = int(t.min()), int(t.max())
        require(low >= 0 and high < count, op, f"{name} must be from 0 to {count - 1}, found {low} to {high}")


def _check_weights(weights: Tensor, op: str, like: Tensor) -> None:
    if weights.dtype not in DTYPES:
        raise TypeError(f"{op}: weights must be float32, float16 or bfloat16, found {weights.dtype}")
    check_strided(weights, op, "weights")
    require(weights.device == like.device, op, f"weights must be on {like.device}, found {weights.device}")


@dataclass
class Routed:
    index: Tensor
    experts: int

    def __post_init__(self) -> None:
        op, index = "routed", self.index
        _check_int64(index, index, op, "index")
        require(index.dim() == 2, op, f"index must be [tokens, k], found {list(index.shape)}")
        require(self.experts >= 0, op, f"experts must not be negative, found {self.experts}")
        require(index.numel() < 2**31, op, f"index must hold less than 2^31 numbers, found {index.numel()}")

    def compute(self) -> Routing:
        index = self.index.reshape(-1).clamp(max=self.experts)
        if index.device.type == "cpu" and index.numel():
            require(int(index.min()) >= 0, "routed", f"index must not be negative, found {int(index.min())}")
        expert, order = index.sort(stable=True)
        expert_numbers = torch.arange(self.experts, device=index.device)
        offsets = torch.searchsorted(expert, expert_numbers, right=True, out_int32=True)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return Routing(order, places.view(self.index.shape), offsets)

    def empty(self) -> Routing:
        index = self.index
        places = index.new_empty(index.shape)
        return Routing(index.new_empty(index.numel()), places, index.new_empty(self.experts, dtype=torch.int32))


@dataclass
class Gathered:
    x: Tensor
    order: Tensor
    k: int

    def __post_init__(self) -> None:
        op = "gathered"
        _check_x(self.x, op, "x")
        require(self.k > 0, op, f"k must be positive, found {self.k}")
        require(self.order.dim() == 1, op, f"order must have one dimension, found {list(self.order.shape)}")
        _check_int64(self.order, self.x, op, "order")

    def compute(self) -> Tensor:
        _check_numbers(self.order, "gathered", "order", len(self.x) * self.k)
        return self.x.index_select(0, self.order // self.k)

    def empty(self) -> Tensor:
        return self.x.new_empty(len(self.order), self.x.shape[1])


@dataclass
class Combined:
    y: Tensor
    weights: Tensor | None
    places: Tensor

    def __post_init__(self) -> None:
        op = "combined"
        _check_x(self.y, op, "y")
        _check_int64(self.places, self.y, op, "places")
        require(self.places.dim() == 2, op, f"places must be [tokens, k], found {list(self.places.shape)}")
        if self.weights is not None:
            _check_weights(self.weights, op, self.y)
            found = f"found {list(self.weights.shape)}"
            require(self.weights.shape == self.places.shape, op, f"weights must be {list(self.places.shape)}, {found}")

    def compute(self) -> Tensor:
        _check_numbers(self.places, "combined", "places", len(self.y))
        result = self.empty()
        if result.numel() == 0 or self.places.numel() == 0:
            return result.zero_()
        if self.weights is None or self.weights.dtype == self.y.dtype:  # gathers and sums in fp32
            return F.embedding_bag(self.places, self.y.contiguous(), mode="sum", per_sample_weights=self.weights)
        rows = self.y[self.places].float()
        return torch.bmm(self.weights.float().unsqueeze(1), rows).squeeze(1).to(result.dtype)

    def empty(self) -> Tensor:
        dtype = self.y.dtype if self.weights is None else torch.promote_types(self.y.dtype, self.weights.dtype)
        return self.y.new_empty(len(self.places), self.y.shape[1], dtype=dtype)


@dataclass
class CombinedBackward:
    grad: Tensor
    y: Tensor | None  # if dw is needed
    weights: Tensor
    order: Tensor
    needs: Sequence[bool]

    def __post_init__(self) -> None:
        op = "combined_backward"
        _check_x(self.grad, op, "grad")
        _check_weights(self.weights, op, self.grad)
        require(self.weights.dim() == 2, op, f"weights must be [tokens, k], found {list(self.weights.shape)}")
        found = f"found {list(self.grad.shape)}"
        require(len(self.grad) == len(self.weights), op, f"grad must have {len(self.weights)} rows, {found}")
        _check_int64(self.order, self.grad, op, "order")
        rows = self.weights.numel()
        require(self.order.shape == (rows,), op, f"order must be [{rows}], found {list(self.order.shape)}")
        if not self.needs[1]:
            return
        if self.y is None:
            raise TypeError(f"{op}: y must be a tensor for the gradient of weights, found None")
        _check_x(self.y, op, "y")
        require(self.y.device == self.grad.device, op, f"y must be on {self.grad.device}, found {self.y.device}")
        shape = [rows, self.grad.shape[1]]
        require(list(self.y.shape) == shape, op, f"y must be {shape}, found {list(self.y.shape)}")

    def compute(self) -> tuple[Tensor, Tensor]:
        k = self.weights.shape[1]
        _check_numbers(self.order, "combined_backward", "order", self.weights.numel())
        dy, dw = self.empty()
        grad = self.grad[self.order // max(1, k)]
        if self.needs[0]:
            dy = (grad * self.weights.reshape(-1)[self.order].unsqueeze(1)).to(grad.dtype)
        if self.needs[1] and self.y is not None:
            sums = (grad.float() * self.y.float()).sum(1)
            dw = dw.zero_().view(-1).index_copy(0, self.order, sums.to(dw.dtype)).view(dw.shape)
        return dy, dw

    def empty(self) -> tuple[Tensor, Tensor]:
        rows, columns = self.weights.numel(), self.grad.shape[1]
        dy = self.grad.new_empty((rows, columns) if self.needs[0] else (0,))
        return dy, self.weights.new_empty(self.weights.shape if self.needs[1] else (0,))


define_by("routed(Tensor index, SymInt experts) -> (Tensor order, Tensor places, Tensor offsets)", Routed)
define_by("gathered(Tensor x, Tensor order, SymInt k) -> Tensor", Gathered)
define_by("combined(Tensor y, Tensor? weights, Tensor places) -> Tensor", Combined)
define_by(
    "combined_backward(Tensor grad, Tensor? y, Tensor weights, Tensor order, bool[2] needs) -> (Tensor dy, Tensor dw)",
    CombinedBackward,
)


def route(index: Tensor, experts: int) -> Routing:
    """Sort the pairs (token, j) by their experts in `index` `[tokens, k]`.

    An index of `experts` or above means no expert. Rows without an expert come last, after all offsets.
    """
    return Routing(*_OPS.routed(index.to(torch.int64), experts))


def gather_rows(x: Tensor, routing: Routing) -> Tensor:
    """Return x for each row's token, `[tokens, n]` -> `[rows, n]`, with a gradient."""
    k = routing.places.shape[1]
    if x.dtype is torch.float64:
        return x[routing.order // k]
    if torch.is_grad_enabled() and x.requires_grad:
        return _Gathered.apply(x, routing.order, routing.places)  # type: ignore[no-untyped-call]
    return _OPS.gathered(x, routing.order, k)


def combine_rows(y: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    """Return, for each token, the sum of its rows of y times its weights `[tokens, k]`, with gradients for both.

    Returns:
        `[tokens, n]` in the promoted dtype of y and the weights.
    """
    if torch.float64 in (y.dtype, weights.dtype):
        return (weights.unsqueeze(-1) * y[routing.places]).sum(1)
    if torch.is_grad_enabled() and (y.requires_grad or weights.requires_grad):
        return _Combined.apply(y, weights, *routing[:2])  # type: ignore[no-untyped-call]
    return _OPS.combined(y, weights, routing.places)


def _refuse_second_order(name: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} cannot be differentiated twice (create_graph=True). "
            "Compute it from differentiable operators instead"
        )


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return _OPS.gathered(x, order, places.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_order("gathered")
        return _OPS.combined(grad, None, *ctx.saved_tensors), None, None


class _Combined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, weights, order)
        ctx.dtype = y.dtype
        return _OPS.combined(y, weights, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_order("combined")
        needs = ctx.needs_input_grad[:2]
        dy, dw = _OPS.combined_backward(grad, *ctx.saved_tensors, needs)
        return dy.to(ctx.dtype) if needs[0] else None, dw if needs[1] else None, None, None
