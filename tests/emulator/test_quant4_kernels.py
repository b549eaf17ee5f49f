"""The NF4 CUDA kernels on the emulator, against the operators on CPU: equal bits over awkward shapes."""

from ctypes import c_int64

import pytest
import torch
from emulator.structs import DTYPES, WeightView
from hypothesis import given, settings, strategies as st
from support.operands import at_thresholds

from peftcore import ops
from peftcore.ops.quant4 import Quantize4bit, QuantizeAbsmax

BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
CODES = {"nf4": ops.NF4, "fp4": ops.FP4}


def data(count, dtype, seed, offset):
    """`count` values that start `offset` elements behind an allocation."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count + offset, generator=generator) * 10.0 ** (seed % 5 - 2)
    x[torch.rand(count + offset, generator=generator) < 0.05] = 0
    return x.to(dtype)[offset:]


def cuda_quantize(emulated, x, code, blocksize, seed, offset=0):
    packed = torch.full(((x.numel() + 1) // 2 + offset,), 0xAA, dtype=torch.uint8)[offset:]
    absmax = torch.full((-(-x.numel() // blocksize),), torch.nan)
    count = c_int64(x.numel())
    launch = emulated("peftcore_quant4_quantize")
    launch(x, DTYPES.index(x.dtype), code, count, blocksize, packed, absmax, seed=seed)
    return packed.unsqueeze(1), absmax


def cuda_dequantize(emulated, weight, dtype, seed=0, offset=0):
    count = torch.Size(weight.shape).numel()
    memory = torch.full((count + offset + 4,), 7, dtype=dtype)
    out = memory[offset : offset + count]
    emulated("peftcore_quant4_dequantize")(WeightView(weight), out, DTYPES.index(dtype), seed=seed)
    assert (memory[:offset] == 7).all() and (memory[offset + count :] == 7).all()
    return out


def bits(t):
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()])


cases = {
    "count": st.one_of(st.integers(1, 300), st.integers(1, 9000), st.sampled_from([1024, 2048, 4096, 8192])),
    "dtype": st.sampled_from(DTYPES),
    "blocksize": st.sampled_from(BLOCKSIZES),
    "name": st.sampled_from(["nf4", "fp4"]),
    "seed": st.integers(0, 10**6),
    "offset": st.sampled_from([0, 0, 1, 8]),
}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(**cases)
def test_quantize(emulated, count, dtype, blocksize, name, seed, offset):
    x = data(count, dtype, seed, offset)
    packed, absmax = cuda_quantize(emulated, x, CODES[name], blocksize, seed)
    wanted = Quantize4bit(x, CODES[name], blocksize).compute()
    assert torch.equal(packed, wanted[0]) and torch.equal(bits(absmax), bits(wanted[1]))


def test_a_partial_block_is_divided_by_its_scale(emulated):
    x = at_thresholds(ops.NF4)
    packed, absmax = cuda_quantize(emulated, x, ops.NF4, 64, seed=1)
    wanted = Quantize4bit(x, ops.NF4, 64).compute()
    assert torch.equal(packed, wanted[0]) and torch.equal(absmax, wanted[1])


def test_quantize_more_than_its_blocks_take_at_a_time(emulated):
    x = data(1057 * 2048, torch.bfloat16, 3, 0)
    packed, absmax = cuda_quantize(emulated, x, ops.NF4, 64, seed=1)
    wanted = Quantize4bit(x, ops.NF4, 64).compute()
    assert torch.equal(packed, wanted[0]) and torch.equal(absmax, wanted[1])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(**cases, out_dtype=st.sampled_from(DTYPES), nested=st.booleans())
def test_dequantize(emulated, count, dtype, blocksize, name, seed, offset, out_dtype, nested):
    x = data(count, dtype, seed, 0)
    weight = ops.quantize_4bit(x, name, blocksize=blocksize, double_quant=nested, nested_blocksize=32)
    found = cuda_dequantize(emulated, weight, out_dtype, seed, offset)
    assert torch.equal(bits(found), bits(weight.values(out_dtype)))


@pytest.mark.parametrize("count", [1, 32, 255, 257, 1000, 5000])
@pytest.mark.parametrize("blocksize", [32, 256, 4096])
def test_quantize_absmax(emulated, count, blocksize):
    absmax = data(count, torch.float32, count, 0).abs()
    offset = absmax.mean()
    quantized = torch.zeros(count, dtype=torch.uint8)
    nested = torch.full((-(-count // blocksize),), torch.nan)
    launch = emulated("peftcore_quant4_quantize_absmax")
    launch(absmax, ops.DYNAMIC8, offset, c_int64(count), blocksize, quantized, nested, seed=count)
    wanted = QuantizeAbsmax(absmax, ops.DYNAMIC8, blocksize).compute()
    assert torch.equal(quantized, wanted[0]) and torch.equal(nested, wanted[1])


@pytest.mark.parametrize("blocksize", [64, 1024])
def test_non_finite_values(emulated, blocksize):
    x = data(4096 + 70, torch.float32, 1, 0)
    x[5], x[2050], x[-1] = torch.nan, torch.inf, -torch.inf
    packed, absmax = cuda_quantize(emulated, x, ops.NF4, blocksize, 0)
    wanted = Quantize4bit(x, ops.NF4, blocksize).compute()
    assert torch.equal(packed, wanted[0])
    assert torch.equal(absmax.isnan(), wanted[1].isnan())
    assert torch.equal(absmax.nan_to_num(), wanted[1].nan_to_num())


def test_every_order_of_threads_gives_the_same_bits(emulated):
    x = data(4100, torch.bfloat16, 2, 0)
    first = cuda_quantize(emulated, x, ops.NF4, 1024, 0)
    for seed in range(1, 20):
        packed, absmax = cuda_quantize(emulated, x, ops.NF4, 1024, seed)
        assert torch.equal(packed, first[0]) and torch.equal(absmax, first[1])


def test_nothing_to_do(emulated):
    nothing = torch.empty(0)
    assert cuda_quantize(emulated, nothing, ops.NF4, 64, 0)[0].numel() == 0
    assert cuda_dequantize(emulated, ops.quantize_4bit(nothing), torch.half).numel() == 0


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 64), (7, 33, 96), (2, 1, 32)])  # some begin within a block of scales
def test_an_expert_is_a_view(emulated, emulated_library, shape, nested):
    x = data(torch.Size(shape).numel(), torch.float32, 3, 0).view(shape)
    weight = ops.quantize_4bit(x, blocksize=32, double_quant=nested, nested_blocksize=32)
    whole = ops.dequantize_4bit(weight)
    for index in range(shape[0]):
        expert = WeightView(weight).expert(emulated_library, index)
        values = torch.zeros(shape[1:])
        emulated("peftcore_quant4_dequantize")(expert, values, 0)
        assert torch.equal(bits(values), bits(whole[index]))


@pytest.mark.nightly
def test_stays_within_its_memory(sanitized):
    done = sanitized("quant4", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    levels = set(ops.extension.cpu_levels() if ops.extension else ["portable"])
    levels -= {"avx512bf16", "amx"}  # which quantize as avx512 does
    assert set(done.stdout.splitlines()) >= {f"{level}: 168 cases agree" for level in levels}
