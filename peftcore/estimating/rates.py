"""Rates of this machine for the operators of a step, measured once in a few seconds and kept in a file.

    an operator   max(operations / rate of such products, elements x seconds of one, bytes / bandwidth) + a call
    a product     operations / rate + what reading its operands takes longer than from the cache
    a step        the sum over its operators, and a page fault for each page that the system maps again

The rate of a product depends on the dtype, the layout (a CPU without bf16 instructions multiplies x Wᵀ ten times as
fast as dy W) and the narrowest dimension, which is small for adapters. peftcore's operators may multiply a dense weight
faster than PyTorch. Each value of a 4-bit weight is also unpacked. Operators that compute more than they move
(`_elements`) have their own time per element; all others take that of an addition. Small tensors are read from caches,
so the bandwidth depends on the size.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from peftcore.estimating.overhead import OUTER, PLAIN, TRANSPOSED
from peftcore.ops.probes import over_dense

if TYPE_CHECKING:
    from peftcore.estimating.following import Operation

aten, ours = torch.ops.aten, torch.ops.peftcore
HALF, SINGLE = "half", "single"
_TYPES = {HALF: torch.bfloat16, SINGLE: torch.float32}
_LAYOUTS = (PLAIN, TRANSPOSED, OUTER)
_NARROW = (1, 8, 32, 128, 512)
_SIZES = (1 << 18, 1 << 21, 1 << 24, 1 << 27)  # bytes
_ROWS, _INNER, _RANK = 512, 1024, 32
_OTHERS = "aten::add"  # for operators without a rate of their own


class Rates(NamedTuple):
    """Rates of this machine with PyTorch's number of threads.

    Args:
        products: (narrowest dimension, operations per second) by dtype and layout.
        dense: Operations per second of (x Wᵀ, dy W) in peftcore's operators over a dense weight, by dtype.
        low_rank: Operations per second of adapters in (x Wᵀ, dy W) of these operators, by dtype.
        attention: Operations per second of PyTorch's (forward, backward) by dtype.
        fused: Operations per second of peftcore's attention (forward, backward) by dtype.
        packed: (seconds per value of a 4-bit weight, operations per second) by dtype.
        elements: Seconds per element, by dtype and operator.
        bandwidth: (bytes moved, bytes per second).
        fresh: Seconds per byte of memory that the system maps again.
        calls: Seconds of a call besides its work: PyTorch's in forward and backward, and peftcore's.
    """

    products: dict[str, dict[str, tuple[tuple[int, float], ...]]]
    dense: dict[str, tuple[float, float]]
    low_rank: dict[str, tuple[float, float]]
    attention: dict[str, tuple[float, float]]
    fused: dict[str, tuple[float, float]]
    packed: dict[str, tuple[float, float]]
    elements: dict[str, dict[str, float]]
    bandwidth: tuple[tuple[int, float], ...]
    fresh: float
    calls: dict[str, float]

    def seconds(self, operation: Operation) -> float:
        """Return the seconds of one operation."""
        cost, kind = operation.cost, HALF if operation.halves else SINGLE
        backward = operation.phase.startswith("backward") and not operation.recomputed
        mine = operation.name.startswith("peftcore::")
        call = self.calls["ours" if mine else "backward" if backward else "forward"]
        if not operation.moved:
            return call
        elements = self.elements[kind]
        name = operation.name if operation.name in elements else operation.name.removesuffix("_")
        size = operation.moved
        worked = size / _between(self.bandwidth, size)
        if cost.flops and "attention" in operation.name:
            rate = (self.fused if mine else self.attention)[kind][backward]
            worked = max(worked, (cost.flops + cost.masked) / rate)
        elif cost.flops:
            cached = size / self.bandwidth[0][1]
            if cost.unpacked:
                of_a_value, rate = self.packed[kind]
                taken = (cost.flops - cost.low_rank[0]) / rate + cost.unpacked * of_a_value
            else:
                layout = cost.product[3] if cost.product is not None else TRANSPOSED
                rate = _between(self.products[kind][layout], cost.narrow or _NARROW[-1])
                if mine or cost.widened:
                    rate *= self.dense[kind][backward] / self.products[kind][layout][-1][1]
                taken = (cost.flops - cost.low_rank[0]) / rate
            worked += max(0.0, taken - cached)  # rates are of operands in the cache
            if cost.low_rank[0] and cost.unpacked:  # computed in 32 bits
                worked += cost.low_rank[0] / _between(self.products[SINGLE][TRANSPOSED], cost.low_rank[1])
            elif cost.low_rank[0]:
                worked += cost.low_rank[0] / self.low_rank[kind][backward]
        else:
            worked = max(worked, operation.elements * elements.get(name, elements[_OTHERS]))
        return operation.times * (worked + call)


def read(found: Mapping[str, Any]) -> Rates:
    """Return the rates that an entry of the file describes.

    Raises:
        KeyError, TypeError, ValueError: The entry has another format.
    """
    made = Rates(**found)
    by_type: tuple[Mapping[str, Any], ...] = (
        made.products, made.dense, made.low_rank, made.attention, made.fused, made.packed, made.elements,
    )  # fmt: skip
    if any(each.keys() != _TYPES.keys() for each in by_type) or not made.bandwidth:
        raise ValueError("rates of other types")
    if any(set(tables) != set(_LAYOUTS) or not all(tables.values()) for tables in made.products.values()) or not all(
        _OTHERS in each for each in made.elements.values()
    ):
        raise ValueError("no rates")
    return made._replace(
        products={
            kind: {layout: tuple((int(n), float(r)) for n, r in rows) for layout, rows in tables.items()}
            for kind, tables in made.products.items()
        },
        dense=_pairs(made.dense),
        low_rank=_pairs(made.low_rank),
        bandwidth=tuple((int(n), float(r)) for n, r in made.bandwidth),
        attention=_pairs(made.attention),
        fused=_pairs(made.fused),
        packed=_pairs(made.packed),
        fresh=float(made.fresh),
        calls={name: float(made.calls[name]) for name in ("forward", "backward", "ours")},
    )


def _pairs(found: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    return {kind: (float(a), float(b)) for kind, (a, b) in found.items()}


def _between(table: Sequence[tuple[int, float]], at: int) -> float:
    """Return the rate at `at`, interpolated in logarithms; outside of the table, that of its nearest entry."""
    place = bisect_left(table, (at,))
    if place in (0, len(table)):
        return table[min(place, len(table) - 1)][1]
    (low, one), (high, other) = table[place - 1], table[place]
    share = math.log(at / low) / math.log(high / low)
    return one ** (1 - share) * other**share


def fastest(call: Callable[[], object], seconds: float = 0.03) -> float:
    """Return the shortest time of at least three runs, or of fewer if a call takes far longer than `seconds`."""
    end = time.perf_counter() + seconds
    call()
    end, last = time.perf_counter() + seconds, end + 3 * seconds
    times: list[float] = []
    while (
        not times or (len(times) < 3 and time.perf_counter() < last) or (time.perf_counter() < end and len(times) < 200)
    ):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def measure() -> Rates:
    """Measure all rates, in a few seconds."""
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with torch.no_grad():
            products = {
                kind: {layout: tuple((n, _product(n, layout, dtype)) for n in _NARROW) for layout in _LAYOUTS}
                for kind, dtype in _TYPES.items()
            }
            dense = {kind: _dense(dtype) for kind, dtype in _TYPES.items()}
            low_rank = {kind: _low_rank(dtype, dense[kind]) for kind, dtype in _TYPES.items()}
            packed = {kind: _packed(dtype) for kind, dtype in _TYPES.items()}
            fused = {kind: _fused(dtype) for kind, dtype in _TYPES.items()}
            attention = {kind: _attention(dtype) for kind, dtype in _TYPES.items()}
            elements = {kind: _elements(dtype) for kind, dtype in _TYPES.items()}
            bandwidth = tuple((size, _bandwidth(size)) for size in _SIZES)
            fresh = _fresh()
        return Rates(products, dense, low_rank, attention, fused, packed, elements, bandwidth, fresh, _calls())


def _product(narrow: int, layout: str, dtype: torch.dtype) -> float:
    """Return operations per second, averaged over a narrow inner dimension and narrow columns."""
    taken = 0.0
    for inner, columns in ((narrow, _INNER), (_INNER, narrow)):
        x = torch.ones((inner, _ROWS) if layout == OUTER else (_ROWS, inner), dtype=dtype)
        w = torch.ones((columns, inner) if layout == TRANSPOSED else (inner, columns), dtype=dtype)
        left, right = x.t() if layout == OUTER else x, w.t() if layout == TRANSPOSED else w
        taken += fastest(lambda: left @ right) / 2  # noqa: B023  # called at once
    return 2 * _ROWS * _INNER * narrow / taken


def _dense(dtype: torch.dtype) -> tuple[float, float]:
    """Return operations per second of x Wᵀ and dy W in peftcore's operators over a dense weight."""
    forward, backward = (2 * _ROWS * _INNER**2 / fastest(call) for call in over_dense(_ROWS, _INNER, dtype))
    return forward, backward


def _low_rank(dtype: torch.dtype, dense: tuple[float, float]) -> tuple[float, float]:
    """Return operations per second of what an adapter of rank 32 adds to these operators, at most those of W."""
    flops = 4.0 * _ROWS * _INNER * _RANK
    forward, backward = (fastest(call) for call in over_dense(_ROWS, _INNER, dtype, _RANK))
    more = [taken - 2 * _ROWS * _INNER**2 / rate for taken, rate in zip((forward, backward), dense, strict=True)]
    return min(dense[0], flops / max(more[0], 1e-9)), min(dense[1], 2 * flops / max(more[1], 1e-9))


def _packed(dtype: torch.dtype) -> tuple[float, float]:
    """Return the seconds per value and the operations per second, from products with few and with many rows."""
    from peftcore.ops import quantize_4bit

    weight, packing = quantize_4bit(torch.randn(_INNER, _INNER)).operands()
    few, many = 32, _ROWS
    taken = {}
    for rows in (few, many):
        x = torch.ones(rows, _INNER, dtype=dtype)
        taken[rows] = sum(
            fastest(lambda: call(x, weight, packing)) / 2  # noqa: B023
            for call in (ours.linear_4bit, ours.linear_4bit_backward)
        )
    of_a_row = max(1e-12, (taken[many] - taken[few]) / (many - few))
    return max(0.0, taken[few] - few * of_a_row) / _INNER**2, 2 * _INNER**2 / of_a_row


def _attention(dtype: torch.dtype) -> tuple[float, float]:
    batch, heads, length, size = 1, 8, 256, 64
    q, k, v = (torch.randn(batch, heads, length, size, dtype=dtype) for _ in range(3))
    attend = aten._scaled_dot_product_flash_attention_for_cpu
    made, sums = attend(q, k, v)
    forward = fastest(lambda: attend(q, k, v))
    backward = fastest(
        lambda: aten._scaled_dot_product_flash_attention_for_cpu_backward(made, q, k, v, made, sums, 0.0, False)
    )
    flops = 4 * batch * heads * length**2 * size
    return flops / forward, 2.5 * flops / backward


def _fused(dtype: torch.dtype) -> tuple[float, float]:
    """Return operations per second of peftcore's attention."""
    batch, heads, length, size = 1, 8, 256, 64
    q, k, v = (torch.randn(batch, heads, length, size, dtype=dtype) for _ in range(3))
    made, sums = ours.attention(q, k, v, None, False, 0.125)
    forward = fastest(lambda: ours.attention(q, k, v, None, False, 0.125))
    backward = fastest(lambda: ours.attention_backward(made, q, k, v, made, sums, None, False, 0.125))
    flops = 4 * batch * heads * length**2 * size
    return flops / forward, 2.5 * flops / backward


def _elements(dtype: torch.dtype) -> dict[str, float]:
    x, y = torch.randn(1024, 1024, dtype=dtype), torch.rand(1024, 1024, dtype=dtype)
    of_heads = x.view(16, 64, 16, 64).transpose(1, 2)
    wide, row = x.view(8, -1), torch.ones(1024, dtype=dtype)
    mean, deviation = torch.zeros(1024, 1, dtype=dtype), torch.ones(1024, 1, dtype=dtype)
    labels, seed = torch.zeros(8, dtype=torch.long), torch.zeros((), dtype=torch.long)
    silu, gelu = (1.0, 0.0), (0.8, 0.036)  # numbers of the formulas
    scale = ours.rms_norm(x, row, 1e-5, 0.0, True)[1]
    other = torch.float32 if dtype is torch.bfloat16 else torch.bfloat16
    z = y.to(other)
    calls: dict[str, Callable[[], object]] = {
        _OTHERS: lambda: x + y,
        "aten::clone": lambda: of_heads.clone(memory_format=torch.contiguous_format),
        "aten::_to_copy": lambda: z.to(dtype),
        "aten::cat": lambda: torch.cat((x, y)),
        "aten::neg": lambda: -x,
        "aten::pow": lambda: x.pow(2),
        "aten::mean": lambda: x.mean(-1),
        "aten::sum": lambda: x.sum(0),
        "aten::linalg_vector_norm": lambda: torch.linalg.vector_norm(x),
        "aten::gelu": lambda: F.gelu(x),
        "aten::gelu_backward": lambda: aten.gelu_backward(y, x),
        "aten::silu": lambda: F.silu(x),
        "aten::silu_backward": lambda: aten.silu_backward(y, x),
        "aten::tanh": lambda: torch.tanh(x),
        "aten::tanh_backward": lambda: aten.tanh_backward(y, x),
        "aten::exp": lambda: x.exp(),
        "aten::_softmax": lambda: aten._softmax(x, -1, False),
        "aten::_softmax_backward_data": lambda: aten._softmax_backward_data(y, x, -1, dtype),
        "aten::_log_softmax": lambda: aten._log_softmax(wide, -1, False),
        "aten::_log_softmax_backward_data": lambda: aten._log_softmax_backward_data(wide, wide, -1, dtype),
        "aten::nll_loss_backward": lambda: aten.nll_loss_backward(row[0], wide, labels, None, 1, -100, row[0]),
        "aten::native_layer_norm": lambda: aten.native_layer_norm(x, [1024], row, row, 1e-5),
        "aten::native_layer_norm_backward": lambda: aten.native_layer_norm_backward(
            y, x, [1024], mean, deviation, row, row, [True, True, True]
        ),
        "aten::addcdiv": lambda: x.addcdiv_(y, y, value=1e-9),
        "aten::addcmul": lambda: x.addcmul_(y, y, value=1e-9),
        "aten::sqrt": lambda: y.sqrt(),
        "aten::div": lambda: x / y,
        "aten::fill": lambda: x.clone().zero_(),
        "peftcore::gated": lambda: ours.gated(x, y, *silu),
        "peftcore::gated_backward": lambda: ours.gated_backward(x, y, x, *silu),
        "peftcore::activated": lambda: ours.activated(x, False, *gelu),
        "peftcore::activated_backward": lambda: ours.activated_backward(y, x, False, *gelu),
        "peftcore::rms_norm": lambda: ours.rms_norm(x, row, 1e-5, 0.0, True),
        "peftcore::rms_norm_backward": lambda: ours.rms_norm_backward(y, x, row, scale, 0.0, True, (True, False)),
        "peftcore::dropout": lambda: ours.dropout(x, 0.1, seed),
    }
    size = {"aten::cat": 2}
    return {name: fastest(call) / x.numel() / size.get(name, 1) for name, call in calls.items()}


def _bandwidth(size: int) -> float:
    x = torch.ones(size // 8)
    out = torch.empty_like(x)
    return size / fastest(lambda: torch.neg(x, out=out))


def _fresh() -> float:
    """Return the seconds per byte of the first write to a page beyond those of the second, in a large tensor."""
    size = 64 << 20
    known = torch.ones(size // 4)
    return max(0.0, fastest(lambda: torch.ones(size // 4)) - fastest(lambda: known.fill_(1.0))) / size


class _Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return operator(*args, **(kwargs or {}))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x)).view(2, 2, 16).transpose(0, 1).reshape(4, 16)))


def _calls() -> dict[str, float]:
    """Return the seconds of a call, from a stack of layers too small to take time for work."""
    from peftcore.ops import linear_4bit, quantize_4bit

    with torch.enable_grad():
        model, x = nn.Sequential(*[_Block() for _ in range(8)]), torch.ones(4, 8)
        with _Counted() as forward:
            y = model(x).sum()
        with _Counted() as backward:
            y.backward()
        of_forward = fastest(lambda: model(x).sum(), 0.1)
        both = fastest(lambda: model(x).sum().backward(), 0.1)
        weight, row = quantize_4bit(torch.ones(64, 64)), torch.ones(1, 64, requires_grad=True)
        mine = fastest(lambda: linear_4bit(row, weight).backward(row), 0.05)
    return {
        "forward": of_forward / forward.count,
        "backward": max(0.0, both - of_forward) / backward.count,
        "ours": mine / 2,
    }
