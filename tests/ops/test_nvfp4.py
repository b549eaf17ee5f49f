"""NVFP4 against float64 at every SIMD level: quantizing and dequantizing. test_small_blocks.py has its products."""

import pytest
import torch
from torch.nn import functional as F

from peftcore import ops
from peftcore.ops.nvfp4 import nvfp4_weight

EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
ENTRIES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def codes_of(weight):
    return torch.stack([weight.codes.flatten() >> 4, weight.codes.flatten() & 15], 1).flatten()


def values_of(weight, global_scale):
    """The values of a packed weight in float64: entry times scale, as E4M3, times the matrix's scale."""
    codes = codes_of(weight).int()
    entries = torch.where(codes & 8 > 0, -1.0, 1.0) * ENTRIES[codes & 7]
    scales = weight.absmax.view(torch.float8_e4m3fn).double().repeat_interleave(16)
    each = global_scale.double().reshape(-1, 1)
    return ((entries * scales).view(each.numel(), -1) * each).view(weight.shape)


@pytest.mark.parametrize("dtype", list(EPS), ids=str)
def test_every_code_and_scale_is_dequantized(dtype, level):
    """Both fp32 products are rounded: an error of one unit in the last place at most, before the one of the dtype."""
    scales = torch.tensor([code for code in range(256) if code % 128 != 127], dtype=torch.uint8)
    codes = torch.arange(256, dtype=torch.uint8).view(32, 8).repeat(8, 1)[: len(scales)]
    for global_scale in (torch.tensor([1.0]), torch.tensor([0.0123])):
        weight = nvfp4_weight(codes.reshape(-1, 1), scales, global_scale, (len(scales), 16), torch.float32)
        dense, found = values_of(weight, global_scale), ops.dequantize_4bit(weight, dtype)
        assert torch.equal(found, weight.values(dtype))
        if global_scale == 1:
            assert torch.equal(found.float(), dense.float().to(dtype).float())
        error = EPS[torch.float32] + EPS[dtype]
        assert ((found.double() - dense).abs() <= error * dense.abs() + 2.0**-25 * (dtype is torch.float16)).all()


def reference(x):
    """Codes, scales as float64, and the matrix's scale, by the rule: in float64 where fp32 is not part of it."""
    g = (x.abs().max().float() / torch.tensor(6 * 448.0)).clamp(min=2.0**-126)
    blocks = x.float().view(-1, 16)
    scale = blocks.abs().amax(1) / (6 * g)
    scale = torch.where(scale == 0, 1, scale.clamp(2.0**-9, 448)).to(torch.float8_e4m3fn)
    scaled = (blocks / (scale.float() * g).unsqueeze(1)).double().flatten()
    distance = (scaled.abs().unsqueeze(1) - ENTRIES).abs()
    tied = distance == distance.min(1, keepdim=True).values
    is_even = torch.arange(8) % 2 == 0
    return torch.where((tied & is_even).any(1), (tied & is_even).int().argmax(1), tied.int().argmax(1)), scale, g


@pytest.mark.parametrize("dtype", list(EPS), ids=str)
@pytest.mark.parametrize("kind", ["normal", "grid", "tiny", "large", "zero"])
def test_quantize_takes_the_nearest_value(kind, dtype):
    x = {
        "normal": normal(6, 64),
        "grid": torch.arange(-24, 25).repeat(8)[:384].view(6, 64) / 4,  # every value half way between two entries
        "tiny": normal(6, 64) * 1e-36,
        "large": normal(6, 64).clamp(-2, 2) * 3e4,
        "zero": torch.zeros(6, 64),
    }[kind].to(dtype)
    if kind == "grid":
        x[0, 0] = 6 * 448  # makes the matrix's scale 1, and the smallest block scales exact
    x[1, :32] = 0
    before = x.clone()
    packed = ops.quantize_nvfp4(x)
    codes, scales, g = reference(x)
    assert torch.equal(x, before)
    assert torch.equal((codes_of(packed) & 7).long(), codes)
    assert torch.equal(packed.absmax, scales.view(torch.uint8)) and torch.equal(packed.nested_absmax, g.view(1))
    assert torch.equal((codes_of(packed) & 8) > 0, (x < 0).flatten())
    assert packed.shape == (6, 64) and packed.quant_type == "nvfp4" and packed.dtype == dtype


def test_each_expert_has_a_scale_of_its_own():
    x = normal(3, 32, 48) * torch.tensor([1.0, 100.0, 0.01]).view(3, 1, 1)
    packed = ops.quantize_nvfp4(x)
    for i in range(3):
        one = ops.quantize_nvfp4(x[i])
        assert torch.equal(ops.dequantize_4bit(one), ops.dequantize_4bit(packed)[i])
        assert torch.equal(ops.dequantize_4bit(packed.expert(i))[0], ops.dequantize_4bit(one))
    offsets = torch.tensor([2, 2, 7], dtype=torch.int32)
    rows = normal(7, 48, seed=1)
    found, dense = ops.grouped_linear(rows, offsets, packed, None, False), ops.dequantize_4bit(packed).double()
    wanted = torch.cat([rows[:2].double() @ dense[0].T, rows[2:].double() @ dense[2].T])
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    part = ops.quantize_nvfp4(x[1, :16], x[1].abs().max())
    assert torch.equal(ops.dequantize_4bit(part), ops.dequantize_4bit(packed)[1, :16])


@pytest.mark.parametrize("dtype", list(EPS), ids=str)
@pytest.mark.parametrize("rows", [1, 4, 33])
def test_linear(rows, dtype, level):
    packed = ops.quantize_nvfp4(normal(66, 80))
    dense, x = values_of(packed, packed.nested_absmax[:1]), normal(rows, 80, seed=1, dtype=dtype)
    magnitude = x.double().abs() @ dense.abs().T
    found = ops.linear_4bit(x, packed)
    assert ((found.double() - F.linear(x.double(), dense)).abs() <= 2 * EPS[dtype] * magnitude).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_is_not_hidden(bad):
    x = normal(3, 96)
    x[1, 40] = bad
    packed = ops.quantize_nvfp4(x)
    assert not ops.dequantize_4bit(packed)[1, 32:48].isfinite().any() and not packed.scales().isfinite().all()


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"the last dimension of x must be a multiple of 16, found \[2, 33\]"):
        ops.quantize_nvfp4(torch.zeros(2, 33))
    with pytest.raises(ValueError, match=r"an expert must have a multiple of 512 values, found \[2, 8, 16\]"):
        ops.quantize_nvfp4(torch.zeros(2, 8, 16))
    assert ops.dequantize_4bit(ops.quantize_nvfp4(torch.zeros(0, 16))).shape == (0, 16)
