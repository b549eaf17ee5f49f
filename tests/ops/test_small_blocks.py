"""Nested scales of 16 values (NVFP4's blocks) against float64 at every SIMD level: values, products and experts."""

import math

import pytest
import torch
from torch.nn import functional as F

from peftcore import ops
from peftcore.ops.grouped_operators import GroupedLinear
from peftcore.ops.weight import PackedWeight, weight_from_operands

EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def made(*shape):
    """A weight with random codes and scales, and its values in float64."""
    draw = torch.Generator().manual_seed(0)
    count = math.prod(shape)
    codes = torch.randint(0, 256, (count // 2, 1), generator=draw, dtype=torch.uint8)
    scales = torch.randint(0, 256, (count // 16,), generator=draw, dtype=torch.uint8)
    nested = torch.rand(-(-count // 16 // 32), generator=draw) + 0.5
    quant_map, nested_map, offset = ops.codebook("nf4"), torch.rand(256, generator=draw), torch.tensor(0.25)
    weight = PackedWeight(codes, scales, quant_map, shape, 16, torch.float32, "nf4", nested, nested_map, offset, 32)
    entries = quant_map.double()[torch.stack([codes >> 4, codes & 15], 1).flatten().int()]
    factors = nested_map.double()[scales.int()] * nested.double().repeat_interleave(32)[: scales.numel()] + 0.25
    return weight, (entries * factors.repeat_interleave(16)).view(shape)


@pytest.mark.parametrize("dtype", list(EPS), ids=str)
def test_every_block_is_dequantized(dtype, level):
    weight, dense = made(9, 336)
    found = ops.dequantize_4bit(weight, dtype)
    assert torch.equal(found, weight.values(dtype))
    torch.testing.assert_close(found.double(), dense, rtol=4 * EPS[torch.float32] + EPS[dtype], atol=0)


@pytest.mark.parametrize("dtype", list(EPS), ids=str)
@pytest.mark.parametrize("rows", [1, 3, 9, 40])
@pytest.mark.parametrize(("n", "k"), [(67, 64), (66, 336), (5, 16)])
def test_linear_and_its_gradient(n, k, rows, dtype, level):
    (packed, dense), bias = made(n, k), normal(n, seed=2, dtype=dtype)
    x = normal(rows, k, seed=1, dtype=dtype).requires_grad_()
    y = ops.linear_4bit(x, packed, bias)
    up = normal(rows, n, seed=3, dtype=dtype)
    y.backward(up)
    x64, up64 = x.detach().double(), up.double()
    magnitude = x64.abs() @ dense.abs().T + bias.double().abs()
    assert ((y.detach().double() - F.linear(x64, dense, bias.double())).abs() <= 4 * EPS[dtype] * magnitude).all()
    assert ((x.grad.double() - up64 @ dense).abs() <= 4 * EPS[dtype] * (up64.abs() @ dense.abs())).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [2, 40])
def test_lora_is_joined(rows, dtype, level):
    packed, dense = made(64, 96)
    x, a, b = normal(rows, 96, seed=1, dtype=dtype), normal(4, 96, seed=2), normal(64, 4, seed=3)
    with torch.no_grad():
        y, norms = ops.lora_linear(x, packed, None, a, b, 0.5), ops.row_norms(packed, a, b, 0.5)
    wanted = x.double() @ dense.T + 0.5 * (x.double() @ a.double().T) @ b.double().T
    scale = 8 * EPS[dtype]
    torch.testing.assert_close(y.double(), wanted, rtol=scale, atol=scale * wanted.abs().max().item())
    torch.testing.assert_close(norms.double(), (dense + 0.5 * b.double() @ a.double()).norm(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_experts(transposed, dtype, level):
    packed, dense = made(3, 64, 96)
    width = 64 if transposed else 96
    x, offsets = normal(41, width, seed=1, dtype=dtype), torch.tensor([2, 2, 41], dtype=torch.int32)
    y = ops.grouped_linear(x, offsets, packed, None, transposed)
    reference = GroupedLinear(x, offsets, *packed.operands(), None, [], transposed).compute()[0]
    expert, turned = torch.tensor([0] * 2 + [2] * 39), dense.mT if transposed else dense
    wanted = torch.stack([x[i].double() @ turned[e].T for i, e in enumerate(expert)])
    scale = 4 * EPS[dtype]
    for found in (y, reference):
        torch.testing.assert_close(found.double(), wanted, rtol=scale, atol=scale * wanted.abs().max().item())


def nvfp4(n, k, kind):
    """A weight in NVFP4, and its values in float64; `kind`: what its scales are like."""
    draw, blocks = torch.Generator().manual_seed(1), n * k // 16
    codes = torch.randint(0, 256, (n * k // 2, 1), generator=draw, dtype=torch.uint8)
    scales = torch.randint(8, 127, (blocks,), generator=draw, dtype=torch.uint8)
    nested = torch.full((-(-blocks // 32),), 0.037)
    e4m3, entries = ops.codebook("e4m3"), ops.codebook("nvfp4")
    if kind == "subnormal, zero and negative":
        scales[:3], scales[-3:] = torch.tensor([0, 7, 200]), torch.tensor([1, 128, 254])
    if kind == "one zero":
        scales[k // 16 + 1] = 0
    if kind == "two factors":
        nested[len(nested) // 2 :] = 0.11
    if kind == "divided":
        e4m3, nested = e4m3 / 27.3, nested.fill_(1)
    parts = codes, scales, entries, (n, k), 16, torch.float32, "nvfp4", nested, e4m3, torch.tensor(0.0), 32
    values = entries.double()[torch.stack([codes >> 4, codes & 15], 1).flatten().int()]
    factors = e4m3.double()[scales.int()] * nested.double().repeat_interleave(32)[:blocks]
    return PackedWeight(*parts), (values * factors.repeat_interleave(16)).view(n, k)


@pytest.mark.parametrize("kind", ["normal", "subnormal, zero and negative", "two factors", "divided"])
@pytest.mark.parametrize("dtype", list(EPS), ids=str)
def test_scales_in_e4m3(dtype, kind, level):
    error = EPS[dtype] * (16 if dtype is torch.float32 else 2)  # in fp32 that of sums
    for n, k in [(67, 64), (34, 320), (16, 448), (33, 48)]:
        packed, dense = nvfp4(n, k, kind)
        for rows in (1, 2, 3, 4, 5, 16, 17, 40):
            x, up = normal(rows, k, seed=1, dtype=dtype), normal(rows, n, seed=3, dtype=dtype)
            y, dx = ops.linear_4bit(x, packed), torch.ops.peftcore.linear_4bit_backward(up, *packed.operands())
            x64, up64 = x.double(), up.double()
            # x in 16-bit integers loses up to 2^-16 of a block's largest value.
            magnitude = x64.abs() @ dense.abs().T + 2.0**-14 * x64.abs().amax(1, keepdim=True) * dense.abs().sum(1)
            assert ((y.double() - x64 @ dense.T).abs() <= error * magnitude).all(), (n, k, rows)
            assert ((dx.double() - up64 @ dense).abs() <= error * (up64.abs() @ dense.abs())).all(), (n, k, rows)


@pytest.mark.parametrize("kind", ["one zero", "subnormal, zero and negative", "two factors"])
def test_scales_of_some_of_the_rows_that_are_multiplied_together(kind, level):
    """Rows so long that the scales of a few are prepared at a time."""
    packed, dense = nvfp4(18, 2048, kind)
    for rows in (1, 2, 4, 5, 13, 16, 32):
        x = normal(rows, 2048, seed=1, dtype=torch.bfloat16)
        y, x64 = ops.linear_4bit(x, packed), x.double()
        magnitude = x64.abs() @ dense.abs().T + 2.0**-14 * x64.abs().amax(1, keepdim=True) * dense.abs().sum(1)
        assert ((y.double() - x64 @ dense.T).abs() <= 2 * EPS[torch.bfloat16] * magnitude).all(), rows


@pytest.mark.parametrize("first", [0, 8])
def test_scales_of_every_exponent(first, level):
    """One block a row, so that no block hides another; 16 rows of x are multiplied by exact products.

    From 8 on, the smallest normal scales have no subnormal ones next to them.
    """
    packed, _ = nvfp4(127, 64, "normal")
    codes, scales = packed.codes.clone(), packed.absmax.clone().view(127, 4)
    scales[:] = torch.arange(127, dtype=torch.uint8).roll(-first)[:, None]
    packed = packed._replace(codes=codes, absmax=scales.view(-1))
    dense = packed.values(torch.float32).double()
    x = normal(16, 64, seed=1, dtype=torch.bfloat16)
    for rows in (1, 8, 16):
        wanted = x[:rows].double() @ dense.T
        magnitude = x[:rows].double().abs() @ dense.abs().T
        magnitude += 2.0**-14 * x[:rows].double().abs().amax(1, keepdim=True) * dense.abs().sum(1)
        y = ops.linear_4bit(x[:rows], packed).double()
        assert ((y - wanted).abs() <= 2 * EPS[torch.bfloat16] * magnitude).all(), rows


def test_other_blocks_and_rows_are_refused():
    tensors, packing = made(2, 64)[0].operands()
    dequantize = torch.ops.peftcore.dequantize_4bit
    for match, parts, numbers in [
        ("blocksize must be a power of two from 32 to 4096, found 16", tensors[:3], [16, 0, 2, 64]),
        ("blocksize must be a power of two from 16 to 4096, found 8", tensors, [8, *packing[1:]]),
        ("rows must be whole blocks of 16", tensors, [16, packing[1], 16, 8]),
    ]:
        for call in (dequantize, weight_from_operands):
            with pytest.raises(ValueError, match=match):
                call(parts, numbers, torch.float32 if call is dequantize else "x")
