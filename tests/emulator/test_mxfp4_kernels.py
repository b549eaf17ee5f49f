"""The CUDA kernels of weights in 4 bits on the emulator, with MXFP4's scales, against float64."""

import pytest
import torch
from emulator.products import check as check_products
from emulator.products import normal
from emulator.structs import DTYPES
from emulator.test_grouped_kernels import Case, Kernels
from emulator.test_linear_4bit_kernel import check, run
from emulator.test_one_launch import in_two
from emulator.test_one_launch import run as run_one_launch
from emulator.test_quant4_kernels import bits, cuda_dequantize

from peftcore import ops


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_every_code_and_scale_is_dequantized(emulated, dtype, offset):
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(16, 1).reshape(-1, 1)
    weight = ops.quantize_mxfp4(torch.zeros(256, 32))
    weight = weight._replace(codes=codes, absmax=torch.arange(256, dtype=torch.uint8))
    found, wanted = cuda_dequantize(emulated, weight, dtype, offset=offset), weight.values(dtype).flatten()
    finite = wanted.isfinite()
    assert torch.equal(bits(found)[finite], bits(wanted)[finite])
    assert torch.equal(found.isnan(), wanted.isnan()) and torch.equal(found.isinf(), wanted.isinf())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 8, 9, 17, 33, 64])
@pytest.mark.parametrize("columns", [32, 96, 576, 1056])
def test_every_way_through_the_launcher_of_products(emulated, dtype, batch, columns):
    weight = ops.quantize_mxfp4(normal(37, columns, seed=batch))
    dense = weight.values(dtype).double()
    x, bias = normal(batch, columns, seed=1, dtype=dtype), normal(37, seed=2, dtype=dtype)
    wanted, magnitude = x.double() @ dense.T + bias.double(), x.double().abs() @ dense.abs().T + bias.double().abs()
    check(run(emulated, x, weight, bias), wanted, magnitude)


def test_lora_takes_two_launches(emulated):
    """Blocks of 32 are too small for the kernel that computes both products."""
    weight, x = ops.quantize_mxfp4(normal(70, 320)), normal(4, 320, seed=3, dtype=torch.half)
    arguments = x, weight, None, normal(8, 320, seed=1), normal(70, 8, seed=2)
    assert run_one_launch(emulated, *arguments) is None
    y, s = in_two(emulated, *arguments)
    wanted = x.double() @ weight.values(torch.float64).T + s.double() @ arguments[-1].double().T
    torch.testing.assert_close(y.double(), wanted, rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", [(3, 0, 5), (40, 1, 70)])
@pytest.mark.parametrize("across", [False, True])
def test_experts(emulated, emulated_library, dtype, counts, across):
    case = Case(counts, 2, dtype, columns=64, packed="mxfp4", across=across, rank=4)
    found = Kernels(emulated_library, emulated).product(case)
    check_products(found, *case.wanted())
