"""Long sums of one sign, as tensor cores add them: by truncation, which the emulator does, too.

Errors of truncation do not cancel. Kernels whose results are fp32 therefore add the products of 16 columns at a time to
sums in registers; without that, the errors here are 9 to 180 times as large.
"""

from ctypes import c_float, c_int64

import pytest
import torch
from emulator.products import dropout
from emulator.structs import DTYPES, Factors, GroupedDown, GroupedProduct, Groups, WeightView, Wide, address

LIMIT = 2e-6  # of fp32 sums, as on the CPU


def positive(*shape, seed=0, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(found, wanted):
    return ((found.double() - wanted) / wanted).abs().max().item()


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


def test_product_of_experts_in_fp32(emulated):
    x, w, offsets = positive(16, 4096), positive(1, 8, 4096, seed=1), torch.tensor([16], dtype=torch.int32)
    y = torch.empty(16, 8)
    launch = GroupedProduct(Groups(offsets, 16), 0, address(x), address(y), 4096, 8, WeightView(w))
    emulated("peftcore_grouped_product")(launch)
    assert error(y, x.double() @ w[0].double().T) < LIMIT


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
