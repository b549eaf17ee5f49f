"""affine4 against float64 at every SIMD level: quantizing, dequantizing, and products of linear layers and experts."""

import pytest
import torch
from torch.nn import functional as F

from peftcore import ops
from peftcore.ops.grouped_operators import GroupedLinear

EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parts(*shape, group, scales=torch.float16, zeros=torch.uint8, seed=0):
    """Codes, scales and zero points (None if `zeros` is) of a weight of standard deviation 1."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, shape, generator=draw)
    of_groups = (*shape[:-1], shape[-1] // group)
    scale = (torch.rand(of_groups, generator=draw) * 0.2 + 0.1).to(scales)
    if zeros is None:
        return codes, scale, None
    if zeros.is_floating_point:
        return codes, scale, torch.rand(of_groups, generator=draw) * 15
    return codes, scale, torch.randint(0, 17, of_groups, generator=draw)


def exact(codes, scales, zeros, permutation=None):
    """The weight in float64, by the specification."""
    group = codes.shape[-1] // scales.shape[-1]
    zero = torch.full(scales.shape, 8.0) if zeros is None else zeros
    scale, zero = (t.double().repeat_interleave(group, -1) for t in (scales, zero))
    dense = scale * (codes.double() - zero)
    return dense if permutation is None else torch.empty_like(dense).index_copy_(-1, permutation, dense)


KINDS = {
    "gptq": {"group": 128},
    "awq": {"group": 64},
    "symmetric": {"group": 128, "scales": torch.bfloat16, "zeros": None},
    "small groups": {"group": 32, "scales": torch.float32},
    "fractions": {"group": 64, "zeros": torch.float32},
    "per channel": {"group": 384},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", list(EPS), ids=str)
def test_every_group_is_dequantized_exactly(kind, dtype, level):
    made = parts(9, 384, **KINDS[kind])
    weight, dense = ops.affine4_weight(*made, dtype=dtype), exact(*made)
    found = ops.dequantize_4bit(weight)
    assert found.dtype == dtype and found.shape == (9, 384)
    assert weight.blocksize == {"group": 128, "awq": 64, "small groups": 32, "fractions": 64}.get(kind, 128)
    if kind == "fractions":
        torch.testing.assert_close(found.double(), dense, rtol=2 * EPS[dtype], atol=1e-6)
    else:
        assert torch.equal(found, dense.float().to(dtype))
    assert torch.equal(weight.values(dtype), found)


@pytest.mark.parametrize("dtype", list(EPS), ids=str)
def test_quantize_rounds_to_nearest(dtype, level):
    x = normal(6, 128, dtype=dtype)
    x[1, :64], x[2, 64:], x[3] = 0, 0.5, -x[3].abs()
    packed = ops.quantize_affine4(x, 64)
    values, scales = packed.values(torch.float32).double(), packed.absmax.double().repeat_interleave(64).view(6, 128)
    assert ((values - x.double()).abs() <= 0.54 * scales).all()  # the range is 15 steps, but for the scale's rounding
    assert (values[x == 0] == 0).all() and packed.zeros.max() <= 15
    assert packed.absmax.dtype == torch.bfloat16 and packed.dtype == dtype and packed.quant_type == "affine4"
    assert torch.equal(ops.dequantize_4bit(packed, torch.float32), packed.values(torch.float32))


def test_scales_of_groups_that_are_not_finite_are_not_finite():
    x = normal(3, 128)
    x[0, 5], x[1, 80], x[2, 127] = torch.nan, torch.inf, -torch.inf
    assert (~ops.quantize_affine4(x).absmax.isfinite()).nonzero().flatten().tolist() == [0, 3, 5]


@pytest.mark.parametrize("dtype", list(EPS), ids=str)
@pytest.mark.parametrize("rows", [1, 3, 4, 9, 40])
@pytest.mark.parametrize("kind", ["gptq", "awq", "symmetric", "small groups", "fractions"])
def test_linear_and_its_gradient(kind, rows, dtype, level):
    made = parts(67, 384, **KINDS[kind])
    packed, dense, bias = ops.affine4_weight(*made), exact(*made), normal(67, seed=2, dtype=dtype)
    x = (normal(rows, 384, seed=1) + 1).to(dtype).requires_grad_()  # a mean, which zero points multiply
    y = ops.linear_4bit(x, packed, bias)
    up = normal(rows, 67, seed=3, dtype=dtype)
    y.backward(up)
    x64, up64 = x.detach().double(), up.double()
    magnitude = 2 * (x64.abs() @ dense.abs().T + bias.double().abs())
    assert y.dtype == dtype
    assert ((y.detach().double() - F.linear(x64, dense, bias.double())).abs() <= 4 * EPS[dtype] * magnitude).all()
    assert ((x.grad.double() - up64 @ dense).abs() <= 4 * EPS[dtype] * (up64.abs() @ dense.abs())).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("permuted", [False, True])
def test_lora_is_joined(permuted, rows, dtype, level):
    permutation = torch.randperm(128, generator=torch.Generator().manual_seed(5)) if permuted else None
    made = parts(64, 128, group=64)
    packed, dense = ops.affine4_weight(*made, permutation=permutation), exact(*made, permutation)
    x, a, b = normal(rows, 128, seed=1, dtype=dtype), normal(4, 128, seed=2), normal(64, 4, seed=3)
    x.requires_grad_(), a.requires_grad_(), b.requires_grad_()
    up = normal(rows, 64, seed=4, dtype=dtype)
    ops.lora_linear(x, packed, None, a, b, 0.5).backward(up)
    found = x.grad, a.grad, b.grad
    with torch.no_grad():
        y = ops.lora_linear(x, packed, None, a, b, 0.5)
        index = torch.zeros(rows, dtype=torch.int64)
        per_sample = ops.lora_linear_per_sample(x[:, None], packed, None, [a], [b], [0.5], index)[:, 0]
        norms = ops.row_norms(packed, a, b, 0.5)
    x64, a64, b64 = (t.detach().double().requires_grad_() for t in (x, a, b))
    wanted = x64 @ dense.T + 0.5 * (x64 @ a64.T) @ b64.T
    wanted.backward(up.double())
    scale = 8 * EPS[dtype]
    for ours in (y, per_sample):
        torch.testing.assert_close(ours.double(), wanted.detach(), rtol=scale, atol=scale * wanted.abs().max().item())
    for ours, theirs in zip(found, (x64.grad, a64.grad, b64.grad), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=scale, atol=scale * theirs.abs().max().item())
    torch.testing.assert_close(norms.double(), (dense + 0.5 * b64 @ a64).detach().norm(dim=1), rtol=1e-5, atol=0)
    assert torch.equal(ops.dequantize_4bit(packed, torch.float32).double(), dense)
    assert torch.equal(ops.dequantize_4bit(packed, out=torch.empty(64, 128)).double(), dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_experts(transposed, dtype, level):
    made = parts(3, 64, 128, group=64)
    packed, dense = ops.affine4_weight(*made), exact(*made)
    out, width = (128, 64) if transposed else (64, 128)
    x, offsets = normal(41, width, seed=1, dtype=dtype), torch.tensor([2, 2, 41], dtype=torch.int32)
    a, b = normal(3, 4, width, seed=2), normal(3, out, 4, seed=3)
    y = ops.grouped_lora_linear(x, offsets, packed, None, a, b, transposed)
    dense = dense.mT if transposed else dense
    expert = torch.tensor([0] * 2 + [2] * 39)
    x64 = x.double()
    wanted = torch.stack([x64[i] @ dense[e].T + b[e].double() @ (a[e].double() @ x64[i]) for i, e in enumerate(expert)])
    scale = 4 * EPS[dtype]
    torch.testing.assert_close(y.double(), wanted, rtol=scale, atol=scale * wanted.abs().max().item())
    reference = GroupedLinear(x, offsets, *packed.operands(), None, [a, b], transposed).compute()[0]
    torch.testing.assert_close(y, reference, rtol=scale, atol=scale * wanted.abs().max().item())


def test_views_of_rows_and_experts():
    matrix, experts = ops.affine4_weight(*parts(6, 64, group=32)), ops.affine4_weight(*parts(3, 4, 64, group=32))
    assert torch.equal(matrix.rows(2, 5).values(torch.float32), matrix.values(torch.float32)[2:5])
    assert torch.equal(ops.dequantize_4bit(experts.expert(1)), ops.dequantize_4bit(experts)[1:2])


def test_parts_that_do_not_fit_are_refused():
    codes, scales, zeros = parts(4, 128, group=64)
    for error, match, arguments, options in [
        (ValueError, "codes must be from 0 to 15, found 0 to 16", (codes + (codes == 15), scales, zeros), {}),
        (ValueError, "groups must be multiples of 32 columns, found 8", (codes[:, :16], scales, zeros), {}),
        (ValueError, r"codes must be \[.., out, in\] and scales", (codes, scales[:3], zeros), {}),
        (ValueError, "zeros must hold 8 elements", (codes, scales, zeros[:3]), {}),
        (ValueError, "zeros must be from 0 to 255, found -", (codes, scales, zeros - 20), {}),
        (TypeError, "only float32, float16 and bfloat16", (codes, scales.double(), zeros), {}),
        (TypeError, "codes must be integers", (codes.float(), scales, zeros), {}),
        (ValueError, "must have each of the 128 inputs once", (codes, scales), {"permutation": torch.ones(128)}),
        (ValueError, r"permutation must be \[in\]", (codes, scales), {"permutation": torch.arange(4)}),
    ]:
        with pytest.raises(error, match=match):
            ops.affine4_weight(*arguments, **options)
    with pytest.raises(ValueError, match=r"must be a multiple of 64, found \[2, 96\]"):
        ops.quantize_affine4(torch.zeros(2, 96))


def test_infinite_inputs_give_what_a_dense_weight_gives(level):
    """Zero points never turn an infinite result into NaN, and rows of x do not reach each other."""
    packed = ops.affine4_weight(*parts(20, 576, group=64))
    x = normal(3, 576).abs()
    x[1, 7] = torch.inf
    found, wanted = ops.linear_4bit(x, packed), F.linear(x, packed.values(torch.float32))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3, equal_nan=True)
    assert found[0].isfinite().all() and found[1].isinf().any()
