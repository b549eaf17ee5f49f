"""Launches of a layer, LoRA over a base in 4 bits, and that sums are the same bits whichever launch adds them.

The launchers are called as lora/cuda/ops.cpp does, which needs a GPU.
"""

from ctypes import byref, c_bool, c_float, c_int64

import pytest
import torch
from emulator.products import dropout, normal
from emulator.structs import FactorCopy, Factors, OneLaunch, WeightView, Wide
from support.whole_run import nightly_but

from peftcore import ops

RANK, OUT, IN = 16, 72, 1088  # so many columns that they are split over blocks


class Layer:
    def __init__(self, emulated, rows, tickets=True):
        self.emulated, self.rows, self.tickets = emulated, rows, tickets
        self.weight = ops.quantize_4bit(normal(OUT, IN), double_quant=True)
        self.x, self.grad = normal(rows, IN, dtype=torch.half), normal(rows, OUT, seed=1, dtype=torch.half)
        self.a, self.b = normal(RANK, IN, seed=2), normal(OUT, RANK, seed=3)
        self.launches = 0

    def launch(self, name, *given):
        before = self.emulated.launches()
        self.emulated(name)(*given, tickets=self.tickets)
        self.launches += self.emulated.launches() - before
        assert not any(self.emulated.tickets())

    def space(self, name, *given):
        return self.emulated.workspace(f"peftcore_{name}_workspace", *given)

    def down(self, wide, factor):
        s, (rows, columns) = torch.zeros(self.rows, RANK), wide.shape
        partial = self.space("lora_down", c_int64(rows), c_int64(columns), RANK)
        self.launch("peftcore_lora_down", Wide(wide), Factors([factor], 0, RANK, [1.5]), dropout(0.1), partial, s)
        return s

    def up(self, thin, factor, out):
        given = Factors([factor], 1, RANK)
        self.launch("peftcore_lora_up", thin, given, dropout(0.1), None, c_bool(False), Wide(out))

    def linear(self, s):
        y, weight = torch.zeros_like(self.grad), WeightView(self.weight)
        partial = self.space("quant4_linear", self.rows, weight)
        self.launch("peftcore_quant4_linear", self.x, 1, self.rows, weight, None, s, self.b, RANK, partial, y)
        return y

    def dequantize(self):
        self.launch("peftcore_quant4_dequantize", WeightView(self.weight), torch.zeros(OUT, IN, dtype=torch.half), 1)

    def one_launch(self):
        s, y, launched = torch.zeros(self.rows, RANK), torch.zeros_like(self.grad), c_bool(False)
        given = OneLaunch(self.x, None, self.a, self.b, 1.5, s, y)
        self.launch("peftcore_lora_one_launch", given, WeightView(self.weight), byref(launched))
        return launched.value

    def copy_factors(self):
        across = [torch.zeros(t.T.shape) for t in (self.a, self.b)]
        copies = [FactorCopy(t, True, to) for t, to in zip((self.a, self.b), across, strict=True)]
        self.launch("peftcore_lora_copy_factors", (FactorCopy * 2)(*copies), 2)
        return across

    def reduce_and_product(self, thin, factor):
        out, product, sizes = torch.zeros(OUT, RANK), torch.zeros_like(thin), (c_int64(self.rows), c_int64(OUT), RANK)
        partials = [self.space(f"lora_{name}", *sizes) for name in ("reduce", "product")]
        given = Wide(self.grad), thin, factor, RANK, c_float(1.5), *partials, out, 0, product
        self.launch("peftcore_lora_reduce_and_product", *given)
        return product

    def reduce(self, thin):
        out, given = torch.zeros(RANK, IN), (c_int64(self.rows), c_int64(IN), RANK)
        partial = self.space("lora_reduce", *given)
        self.launch("peftcore_lora_reduce", Wide(self.x), thin, RANK, dropout(0.1), partial, out, 0, c_bool(True))
        return out


@pytest.mark.parametrize(("rows", "launches"), [(1, 1), (4, 1), (8, 1), (9, 2), (16, 2), (17, 2), (64, 2)])
def test_skinny_products(emulated, rows, launches):
    layer = Layer(emulated, rows)
    if not layer.one_launch():
        layer.linear(layer.down(layer.x, layer.a))
    assert layer.launches == launches


def test_a_training_step(emulated):
    """Count launches, without one each way for the base's product by cuBLAS."""
    layer = Layer(emulated, 600)
    layer.dequantize()
    s = layer.down(layer.x, layer.a)
    layer.up(s, layer.b, layer.grad.clone())
    assert layer.launches == 4 - 1
    layer.launches = 0
    a_across, b_across = layer.copy_factors()
    t = layer.reduce_and_product(s, b_across)
    layer.reduce(t)
    layer.up(t, a_across, layer.x.clone())
    layer.dequantize()
    assert layer.launches == 7 - 1


@pytest.mark.parametrize("rows", nightly_but([9, 40, 300, 600], [9, 300]))
def test_a_launch_that_adds_gives_the_same_bits(emulated, rows):
    results = []
    for tickets in (True, False):
        layer = Layer(emulated, rows, tickets)
        s = layer.down(layer.x, layer.a)
        results.append([s, layer.reduce(s), *([layer.linear(s)] if rows <= 64 else [])])
        assert layer.launches == (1 if tickets else 2) * len(results[-1])
    assert all(map(torch.equal, *results))
