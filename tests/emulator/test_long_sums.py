"""Long sums of one sign, as tensor cores add them: by truncation, which the emulator does, too.

Errors of truncation do not cancel. Kernels therefore add the products of 16 to 64 columns at a time to sums in
registers; without that, the errors here are 2 to 180 times as large.
"""

from ctypes import c_float, c_int64

import pytest
import torch
from emulator.products import dropout
from emulator.structs import DTYPES, Factors, GroupedDown, GroupedSkinny, GroupedUp, Groups, WeightView, Wide, address
from emulator.test_linear_4bit_kernel import run as linear_4bit

from peftcore import ops

LIMIT = 2e-6  # of fp32 sums, as on the CPU


def positive(*shape, seed=0, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(found, wanted):
    """Return the largest error of the sums before they were rounded to 16 bits, if they were, or a lower bound of it.

    A sum that is off by e is rounded to a value whose error is at most 2e above that of the exact sum's rounding.
    """
    off = (found.double() - wanted).abs()
    if found.dtype != torch.float32:
        off = (off - (wanted.to(found.dtype).double() - wanted).abs()) / 2
    return (off / wanted).max().item()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_down(emulated, dtype):
    x, a = positive(1, 20, 14336, dtype=dtype), positive(8, 14336, seed=1)
    s, index = torch.empty(20, 8), torch.zeros(1, dtype=torch.int64)  # with an index, blocks do not share columns
    emulated("peftcore_lora_down")(Wide(x), Factors([a], 0, 8, [1.0], index), dropout(0.0), None, s)
    assert error(s, x[0].double() @ a.double().T) < LIMIT


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_down_of_experts(emulated, dtype):
    x, a, offsets = positive(20, 4096, dtype=dtype), positive(1, 8, 4096, seed=1), torch.tensor([20], dtype=torch.int32)
    s = torch.empty(20, 8)
    launch = GroupedDown(Groups(offsets, 20), DTYPES.index(dtype), address(x), 4096, address(a))
    launch.rank, launch.scale, launch.out = 8, 1.0, address(s)
    emulated("peftcore_grouped_down")(launch)
    assert error(s, x.double() @ a[0].double().T) < LIMIT


def test_low_rank_product_of_experts(emulated):
    y, thin, factor = torch.zeros(16, 8), positive(16, 512), positive(1, 8, 512, seed=1)
    offsets = torch.tensor([16], dtype=torch.int32)
    launch = GroupedUp(Groups(offsets, 16), DTYPES.index(y.dtype), 8)
    launch.thin, launch.factor, launch.rank, launch.out = address(thin), address(factor), 512, address(y)
    emulated("peftcore_grouped_up")(launch)
    assert error(y, thin.double() @ factor[0].double().T) < LIMIT


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_low_rank_product(emulated, dtype):
    thin, factor, y = positive(16, 2048), positive(64, 2048, seed=1), torch.zeros(16, 64, dtype=dtype)
    emulated("peftcore_lora_up")(thin, Factors([factor], 1, 2048), dropout(0.0), None, False, Wide(y))
    assert error(y, thin.double() @ factor.double().T) < LIMIT


@pytest.mark.parametrize("rows", [1, 8])
def test_products_from_four_bits(emulated, rows):
    columns = 14336
    x, w = positive(rows, columns, dtype=torch.half), ops.quantize_4bit(positive(1, 16, columns, seed=1))
    exact = x.double() @ ops.dequantize_4bit(w, torch.half)[0].double().T
    assert error(linear_4bit(emulated, x, w, None), exact) < LIMIT
    y, offsets = torch.empty(rows, 16, dtype=x.dtype), torch.tensor([rows], dtype=torch.int32)
    launch = GroupedSkinny(Groups(offsets, rows), DTYPES.index(x.dtype), address(x), address(y), columns, 16)
    launch.weight = WeightView(w)
    emulated("peftcore_grouped_skinny")(launch)
    assert error(y, exact) < LIMIT


def test_gradients(emulated):
    """R and P of one pass: rows and columns are divided among blocks."""
    wide, thin, factor = positive(1024, 256, dtype=torch.half), positive(1024, 8, seed=1), positive(8, 256, seed=2)
    sizes = c_int64(1024), c_int64(256), 8
    partials = [emulated.workspace(f"peftcore_lora_{name}_workspace", *sizes) for name in ("reduce", "product")]
    out, product = torch.empty(256, 8), torch.empty(1024, 8)
    launch = emulated("peftcore_lora_reduce_and_product")
    launch(Wide(wide), thin, factor, 8, c_float(1.0), *partials, out, 0, product)
    assert error(out, wide.double().T @ thin.double()) < LIMIT
    assert error(product, wide.double() @ factor.double().T) < LIMIT
