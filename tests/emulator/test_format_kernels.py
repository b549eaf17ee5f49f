"""The CUDA kernels of MXFP4, NVFP4 and affine4 on the emulator, against float64 of the decoded values."""

import pytest
import torch
from emulator.formats import KINDS, exact, group_of, packed
from emulator.products import check as check_products, normal
from emulator.structs import DTYPES, WeightView
from emulator.test_grouped_kernels import Case, Kernels
from emulator.test_linear_4bit_kernel import check, run, takes
from emulator.test_one_launch import in_two, run as run_one_launch
from emulator.test_quant4_kernels import bits, cuda_dequantize
from support.whole_run import nightly_but

from peftcore import ops

HALVES = DTYPES[1:]
SOME = nightly_but(
    KINDS, ["mxfp4", "nvfp4", "awq"]
)  # of the kinds, for kernels that decode all of them by the same lines


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_every_code_and_scale_of_mxfp4_is_dequantized(emulated, dtype, offset):
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(16, 1).reshape(-1, 1)
    weight = ops.quantize_mxfp4(torch.zeros(256, 32))
    weight = weight._replace(codes=codes, absmax=torch.arange(256, dtype=torch.uint8))
    found, wanted = cuda_dequantize(emulated, weight, dtype, offset=offset), weight.values(dtype).flatten()
    finite = wanted.isfinite()
    assert torch.equal(bits(found)[finite], bits(wanted)[finite])
    assert torch.equal(found.isnan(), wanted.isnan()) and torch.equal(found.isinf(), wanted.isinf())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_every_code_and_scale_of_nvfp4_is_dequantized(emulated, dtype, offset):
    every = torch.arange(256, dtype=torch.uint8)  # of the bytes of codes, for every scale
    weight = packed("nvfp4", 512, 256)._replace(codes=every.repeat(256).view(-1, 1), absmax=every.repeat_interleave(32))
    found, wanted = cuda_dequantize(emulated, weight, dtype, offset=offset), weight.values(dtype).flatten()
    assert torch.equal(bits(found), bits(wanted)) and wanted.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_rounded_once(emulated, kind, dtype):
    weight = packed(kind, 9, 384, seed=1)
    for offset in (0, 1):  # by vectors, and one by one
        found = cuda_dequantize(emulated, weight, dtype, offset=offset)
        assert torch.equal(found, weight.values(dtype).flatten())
        if kind != "fractions":  # whose differences are rounded, too
            assert torch.equal(found, exact(weight).float().to(dtype).flatten())


@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("batch", nightly_but([1, 4, 8, 9, 17, 33, 64], [4, 8, 17]))
@pytest.mark.parametrize("groups", nightly_but([1, 3, 4, 9], [3, 4]))
def test_products_of_every_number_of_rows(emulated, kind, dtype, batch, groups):
    columns = groups * max(group_of(kind), 64)
    weight = packed(kind, 37, columns, seed=batch)
    dense = weight.values(dtype).double()
    x, bias = normal(batch, columns, seed=1, dtype=dtype), normal(37, seed=2, dtype=dtype)
    wanted, magnitude = x.double() @ dense.T + bias.double(), x.double().abs() @ dense.abs().T + bias.double().abs()
    check(run(emulated, x, weight, bias, seed=batch), wanted, magnitude)


def test_four_scales_off_the_word_that_they_are_read_as_are_left_to_the_library(emulated):
    weight, x = packed("nvfp4", 19, 640), normal(3, 640, seed=1, dtype=torch.half)
    moved = torch.cat([weight.absmax[:1], weight.absmax])[1:]
    assert takes(emulated, x, weight) and not takes(emulated, x, weight._replace(absmax=moved))


@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("batch", nightly_but([3, 8, 20, 40], [3, 20]))
def test_a_column_of_w_has_the_bits_of_dequantization(emulated, kind, dtype, batch):
    weight = packed(kind, 19, 640, seed=batch)
    dense = weight.values(dtype)
    for columns in torch.arange(batch * 4).mul_(29).remainder_(640).split(batch * 2):
        columns = columns[:batch]
        x = torch.nn.functional.one_hot(columns, 640).to(dtype)
        assert torch.equal(run(emulated, x, weight, None), dense[:, columns].T)


@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize("batch", [1, 5, 18])
def test_infinity_in_the_last_column_stays_there(emulated, kind, batch):
    weight, x = packed(kind, 9, 384), normal(batch, 384, seed=1, dtype=torch.bfloat16)
    x[:, -1] = torch.inf
    wanted = (weight.values(torch.bfloat16)[:, -1] * torch.inf).expand(batch, -1)  # NaN where a weight is 0
    assert torch.equal(run(emulated, x, weight, None).nan_to_num(7), wanted.nan_to_num(7))


@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize("shape", nightly_but([(1, 384), (4, 1408), (8, 640)], [(1, 384), (8, 640)]), ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_lora_takes_one_launch(emulated, kind, shape, dtype):
    batch, columns = shape
    weight, x = packed(kind, 70, columns), normal(batch, columns, seed=3, dtype=dtype)
    arguments = x, weight, normal(70, seed=4, dtype=dtype), normal(8, columns, seed=1), normal(70, 8, seed=2)
    y, s = run_one_launch(emulated, *arguments)
    assert all(map(torch.equal, (y, s), in_two(emulated, *arguments)))
    dense, b = weight.values(dtype).double(), arguments[-1].double()
    wanted = x.double() @ dense.T + s.double() @ b.T + arguments[2].double()
    check(y, wanted, x.double().abs() @ dense.abs().T + s.double().abs() @ b.abs().T + arguments[2].double().abs())


def test_lora_takes_two_launches_where_a_row_ends_within_64_columns(emulated):
    arguments = normal(4, 96, seed=3, dtype=torch.half), packed("mxfp4", 70, 96), None
    assert run_one_launch(emulated, *arguments, normal(8, 96, seed=1), normal(70, 8, seed=2)) is None


@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("counts", [(3, 0, 5), (9, 16)], ids=str)
def test_experts(emulated, emulated_library, kind, dtype, counts):
    case = Case(counts, 2, dtype, inner=128, columns=128, packed=kind, rank=4)
    check_products(Kernels(emulated_library, emulated).skinny(case), *case.wanted())


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_is_a_view(emulated, emulated_library, kind):
    weight = packed(kind, 5, 3, 384)
    for index in range(5):
        out = torch.empty(3 * 384)
        emulated("peftcore_quant4_dequantize")(WeightView(weight).expert(emulated_library, index), out, 0)
        assert torch.equal(out.view(3, 384), weight.values(torch.float32)[index])
