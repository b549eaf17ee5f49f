"""MXFP4 against float64 at every SIMD level: quantizing, dequantizing, and products of linear layers and experts."""

import pytest
import torch
from torch.nn import functional as F

from peftcore import ops
from peftcore.ops.grouped_operators import GroupedLinear
from peftcore.ops.mxfp4 import QuantizeMxfp4, swap_nibbles
from peftcore.ops.weight import POWERS_OF_TWO, PackedWeight, weight_from_operands

EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
ENTRIES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def values_of(weight):
    """The values of a packed weight in float64, by the specification, code by code."""
    codes = torch.stack([weight.codes.flatten() >> 4, weight.codes.flatten() & 15], 1).flatten().tolist()
    scales = [2.0 ** (e - 127) if e != 255 else float("nan") for e in weight.absmax.flatten().tolist()]
    numbers = [(-1.0 if code & 8 else 1.0) * ENTRIES[code & 7] * scales[i // 32] for i, code in enumerate(codes)]
    return torch.tensor(numbers, dtype=torch.float64).view(weight.shape)


def every_value():
    """A weight with all scales, and with all codes in each block."""
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(16, 1)
    weight = ops.quantize_mxfp4(torch.zeros(256, 32))
    return weight._replace(codes=codes.reshape(-1, 1), absmax=torch.arange(256, dtype=torch.uint8))


def same(a, b):
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("dtype", list(EPS), ids=str)
def test_every_code_and_scale_is_dequantized_exactly(dtype, level):
    weight = every_value()
    wanted = values_of(weight).float().to(dtype)  # fp32 has all values but those above its range
    tiny = torch.finfo(dtype).smallest_normal  # AVX-512's conversion to bf16 flushes subnormals
    found = ops.dequantize_4bit(weight, dtype)
    if dtype is torch.bfloat16:
        found, wanted = (torch.where(t.abs() < tiny, 0, t) for t in (found, wanted))
    assert found.dtype == dtype and same(found, wanted)
    assert same(weight.values(dtype).float(), values_of(weight).float().to(dtype).float())


def nearest(x):
    """Code and byte of each value and block of a matrix, in float64: the nearest entry, of two the even code."""
    bytes_, codes = [], []
    for block in x.double().view(-1, 32):
        most = block.abs().max().item()
        e = max(torch.frexp(torch.tensor(most, dtype=torch.float64)).exponent.item() - 3, -127) if most else -127
        bytes_.append(e + 127)
        for value in (block / 2.0**e).tolist():
            distance = [(abs(abs(value) - entry), code % 2, code) for code, entry in enumerate(ENTRIES)]
            codes.append(min(distance)[2])
    return torch.tensor(codes), torch.tensor(bytes_, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", list(EPS), ids=str)
@pytest.mark.parametrize("kind", ["normal", "grid", "tiny", "large"])
def test_quantize_takes_the_nearest_value(kind, dtype, level):
    x = {
        "normal": normal(6, 64),
        "grid": torch.arange(-24, 25).repeat(8)[:384].view(6, 64) / 4,  # every value half way between two entries
        "tiny": normal(6, 64) * 1e-38,
        "large": normal(6, 64).clamp(-2, 2) * 3e4,
    }[kind].to(dtype)
    x[1, :32] = 0
    packed = ops.quantize_mxfp4(x)
    codes, scales = nearest(x)
    found = torch.stack([packed.codes.flatten() >> 4, packed.codes.flatten() & 15], 1).flatten()
    assert torch.equal(packed.absmax, scales)
    assert torch.equal((found & 7).long(), codes)
    assert same(values_of(packed), torch.copysign(values_of(packed).abs(), x.double()))
    reference = QuantizeMxfp4(x).compute()
    assert torch.equal(packed.codes, reference[0]) and torch.equal(packed.absmax, reference[1])
    assert packed.shape == (6, 64) and packed.quant_type == "mxfp4" and packed.dtype == dtype


def test_blocks_that_are_not_finite_have_the_scale_nan(level):
    x = normal(3, 96)
    x[0, 5], x[1, 40], x[2, 95] = torch.nan, torch.inf, -torch.inf
    packed = ops.quantize_mxfp4(x)
    assert (packed.absmax == 255).nonzero().flatten().tolist() == [0, 4, 8]
    assert ops.dequantize_4bit(packed).isnan().sum() == 3 * 32


@pytest.mark.parametrize("dtype", list(EPS), ids=str)
@pytest.mark.parametrize("rows", [1, 3, 4, 9, 33])
@pytest.mark.parametrize(("n", "k"), [(67, 64), (66, 320), (33, 96), (5, 32)])
def test_linear_and_its_gradient(n, k, rows, dtype, level):
    packed = ops.quantize_mxfp4(normal(n, k))
    dense, bias = values_of(packed), normal(n, seed=2, dtype=dtype)
    x = normal(rows, k, seed=1, dtype=dtype).requires_grad_()
    y = ops.linear_4bit(x, packed, bias)
    up = normal(rows, n, seed=3, dtype=dtype)
    y.backward(up)
    x64, up64 = x.detach().double(), up.double()
    magnitude = x64.abs() @ dense.abs().T + bias.double().abs()
    assert y.dtype == dtype
    assert ((y.detach().double() - F.linear(x64, dense, bias.double())).abs() <= 2 * EPS[dtype] * magnitude).all()
    assert ((x.grad.double() - up64 @ dense).abs() <= 2 * EPS[dtype] * (up64.abs() @ dense.abs())).all()


@pytest.mark.parametrize("rows", [1, 2, 4, 16])
@pytest.mark.parametrize("k", [512, 1088])
def test_a_product_has_every_scale(k, rows, level):
    packed = ops.quantize_mxfp4(normal(33, k, seed=4))
    scales = packed.absmax.view(33, k // 32)
    scales[2, 0], scales[5, 3], scales[20, -1], scales[32, -1] = 255, 0, 255, 0
    x = normal(rows, k, seed=1, dtype=torch.bfloat16)
    dense = values_of(packed)
    found, wanted = ops.linear_4bit(x, packed).double(), F.linear(x.double(), dense)
    assert found.isnan().nonzero()[:, 1].unique().tolist() == [2, 20]
    magnitude = x.double().abs() @ dense.abs().T
    assert ((found - wanted).abs() <= 2 * EPS[torch.bfloat16] * magnitude).logical_or(wanted.isnan()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [2, 40])
def test_lora_is_joined(rows, dtype, level):
    packed = ops.quantize_mxfp4(normal(64, 96))
    x, a, b = normal(rows, 96, seed=1, dtype=dtype), normal(4, 96, seed=2), normal(64, 4, seed=3)
    x.requires_grad_(), a.requires_grad_(), b.requires_grad_()
    ops.lora_linear(x, packed, None, a, b, 0.5).backward(normal(rows, 64, seed=4, dtype=dtype))
    found = x.grad, a.grad, b.grad
    with torch.no_grad():
        y = ops.lora_linear(x, packed, None, a, b, 0.5)
    x64, a64, b64 = (t.detach().double().requires_grad_() for t in (x, a, b))
    wanted = x64 @ values_of(packed).T + 0.5 * (x64 @ a64.T) @ b64.T
    wanted.backward(normal(rows, 64, seed=4, dtype=dtype).double())
    scale = 8 * EPS[dtype]
    torch.testing.assert_close(y.double(), wanted.detach(), rtol=scale, atol=scale * wanted.abs().max().item())
    for ours, theirs in zip(found, (x64.grad, a64.grad, b64.grad), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=scale, atol=scale * theirs.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_experts(transposed, dtype, level):
    packed = ops.quantize_mxfp4(normal(3, 64, 96))
    out, width = (96, 64) if transposed else (64, 96)
    x, offsets = normal(41, width, seed=1, dtype=dtype), torch.tensor([2, 2, 41], dtype=torch.int32)
    a, b = normal(3, 4, width, seed=2), normal(3, out, 4, seed=3)
    y = ops.grouped_lora_linear(x, offsets, packed, None, a, b, transposed)
    dense = values_of(packed).mT if transposed else values_of(packed)
    expert = torch.tensor([0] * 2 + [2] * 39)
    x64 = x.double()
    wanted = torch.stack([x64[i] @ dense[e].T + b[e].double() @ (a[e].double() @ x64[i]) for i, e in enumerate(expert)])
    scale = 4 * EPS[dtype]
    torch.testing.assert_close(y.double(), wanted, rtol=scale, atol=scale * wanted.abs().max().item())
    reference = GroupedLinear(x, offsets, *packed.operands(), None, [a, b], transposed).compute()[0]
    torch.testing.assert_close(y, reference, rtol=scale, atol=scale * wanted.abs().max().item())


def test_parts_that_do_not_fit_are_refused():
    """A weight's kind of scales is in its packing: bytes are never read as another kind."""
    packed = ops.quantize_mxfp4(normal(2, 64))
    tensors, packing = packed.operands()
    assert packing == [32, POWERS_OF_TWO, 2, 64]
    dequantize = torch.ops.peftcore.dequantize_4bit

    def refuses(error, match, tensors, packing):
        for call in (
            lambda: dequantize(tensors, packing, torch.float32),
            lambda: weight_from_operands(tensors, packing, "x"),
        ):
            with pytest.raises(error, match=match):
                call()

    refuses(TypeError, "absmax must be .*[Ff]loat", tensors, [32, 0, 2, 64])
    refuses(TypeError, "absmax must be .*[Bb]yte|uint8", [tensors[0], torch.ones(4), tensors[2]], packing)
    refuses(ValueError, "rows must be whole blocks of 32", tensors, [32, POWERS_OF_TWO, 8, 16])
    refuses(ValueError, "nested_blocksize must be a power of two", [*tensors, *[torch.ones(1)] * 3], packing)
    with pytest.raises(ValueError, match=r"the last dimension of x must be a multiple of 32, found \[2, 33\]"):
        ops.quantize_mxfp4(torch.zeros(2, 33))


def test_the_operator_passes_opcheck():
    torch.library.opcheck(torch.ops.peftcore.quantize_mxfp4, (normal(2, 64),))


def test_views_of_rows_and_experts():
    matrix, experts = ops.quantize_mxfp4(normal(6, 64)), ops.quantize_mxfp4(normal(3, 4, 32))
    assert torch.equal(matrix.rows(2, 5).values(torch.float32), matrix.values(torch.float32)[2:5])
    one: PackedWeight = experts.expert(1)
    assert torch.equal(ops.dequantize_4bit(one), ops.dequantize_4bit(experts)[1:2])
    assert torch.equal(one.scales(), experts.scales()[4:8])


def test_nibbles_are_exchanged_in_place():
    codes = torch.tensor([[0x12], [0xF0]], dtype=torch.uint8)
    assert swap_nibbles(codes) is codes and codes.flatten().tolist() == [0x21, 0x0F]
