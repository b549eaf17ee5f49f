"""LoRA over a base in 4 bits in one launch, for few rows: against float64 and the launches that it replaces."""

from ctypes import byref, c_bool, c_int64

import pytest
import torch
from emulator.products import check, dropout, guarded, normal, untouched
from emulator.structs import DTYPES, Factors, OneLaunch, WeightView, Wide

from peftcore import ops

CASES = [
    (1, 1, 8),
    (1, 16, 70),
    (2, 3, 16),
    (4, 64, 9),
    (5, 8, 37),
    (8, 100, 16),
    (8, 16, 130),
]  # rows of x, rank, of W


def case(batch, rank, rows, columns=320, dtype=torch.bfloat16, factors=torch.float32, nested=True):
    """(x, weight, bias, A, B), and the weight in float64."""
    weight = ops.quantize_4bit(normal(rows, columns, seed=batch), double_quant=nested, nested_blocksize=32)
    a, b = normal(rank, columns, seed=1, dtype=factors), normal(rows, rank, seed=2, dtype=factors)
    x, bias = normal(batch, columns, seed=3, dtype=dtype), normal(rows, seed=4, dtype=dtype)
    return (x, weight, bias, a, b), ops.dequantize_4bit(weight, dtype).double()


def run(emulated, x, weight, bias, a, b, scale=0.75, seed=0, tickets=True):
    """(y, s), or None where nothing was launched."""
    around_y, y = guarded(len(x), weight.shape[0], dtype=x.dtype)
    around_s, s = guarded(len(x), len(a), dtype=torch.float32)
    launched, before = c_bool(False), emulated.launches()
    given = OneLaunch(x, bias, a, b, scale, s, y)
    emulated("peftcore_lora_one_launch")(given, WeightView(weight), byref(launched), seed=seed, tickets=tickets)
    untouched(around_y)
    untouched(around_s)
    assert emulated.launches() - before == launched.value
    assert not any(emulated.tickets())
    return (y, s) if launched.value else None


def in_two(emulated, x, weight, bias, a, b, scale=0.75):
    """Return y and s computed by separate launchers."""
    rank, (batch, columns) = len(a), x.shape
    s, y = torch.zeros(batch, rank), torch.zeros(batch, weight.shape[0], dtype=x.dtype)
    partial = emulated.workspace("peftcore_lora_down_workspace", c_int64(batch), c_int64(columns), rank)
    factors = Factors([a], 0, rank, [scale])
    emulated("peftcore_lora_down")(Wide(x), factors, dropout(0.0), partial, s)
    given = x, DTYPES.index(x.dtype), batch, WeightView(weight)
    partial = emulated.workspace("peftcore_quant4_linear_workspace", *given[2:])
    emulated("peftcore_quant4_linear")(*given, bias, s, b, rank, partial, y)
    return y, s


@pytest.mark.parametrize("factors", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("batch", "rank", "rows"), CASES)
def test_against_float64(emulated, batch, rank, rows, dtype, factors):
    given, dense = case(batch, rank, rows, dtype=dtype, factors=factors, nested=rank != 8)
    x, _, bias, a, b = (t if isinstance(t, ops.PackedWeight) else t.double() for t in given)
    y, s = run(emulated, *given, seed=rank)
    check(s, 0.75 * x @ a.T, 0.75 * x.abs() @ a.abs().T)
    wanted = x @ dense.T + s.double() @ b.T + bias
    check(y, wanted, x.abs() @ dense.abs().T + s.double().abs() @ b.abs().T + bias.abs())


@pytest.mark.parametrize(("batch", "rank", "rows"), CASES)
@pytest.mark.parametrize("columns", [64, 1088, 5120])
def test_the_bits_of_two_launches(emulated, batch, rank, rows, columns):
    given, _ = case(batch, rank, rows, columns)
    assert all(map(torch.equal, run(emulated, *given), in_two(emulated, *given)))


def test_every_order_of_blocks_and_threads_gives_the_same_bits(emulated):
    given, _ = case(3, 20, 60)
    first = run(emulated, *given)
    for seed in range(1, 12):
        assert all(map(torch.equal, run(emulated, *given, seed=seed), first))


def test_what_it_does_not_take(emulated):
    given, _ = case(2, 4, 16)
    assert run(emulated, *given, tickets=False) is None
    assert run(emulated, *case(9, 4, 16)[0]) is None
    assert run(emulated, *case(2, 4, 16, dtype=torch.float32)[0]) is None
    assert run(emulated, *case(2, 4, 16, columns=96)[0]) is None  # rows of W begin within a block of 64
    moved = torch.zeros(given[0].numel() + 1, dtype=torch.bfloat16)[1:].view_as(given[0]).copy_(given[0])
    assert run(emulated, moved, *given[1:]) is None


def test_factors_off_16_bytes(emulated):
    (x, weight, bias, a, b), _ = case(2, 4, 16)
    moved = torch.zeros(a.numel() + 1)[1:].view_as(a).copy_(a)
    assert all(map(torch.equal, run(emulated, x, weight, bias, moved, b), run(emulated, x, weight, bias, a, b)))
