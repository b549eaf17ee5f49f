"""Calls of 4-bit operators: dtypes and gradients of results, and PyTorch's checks of operators."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from peftcore import ops
from peftcore.ops import PackedWeight


def data(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype)


def test_out_gives_the_dtype():
    x = data(6, 50, dtype=torch.bfloat16)
    weight = ops.quantize_4bit(x)
    wanted = ops.dequantize_4bit(weight)
    assert wanted.dtype == torch.bfloat16 and wanted.shape == x.shape
    for out in (torch.empty(6, 50, dtype=torch.bfloat16), torch.empty(50, 6, dtype=torch.bfloat16).t()):
        assert ops.dequantize_4bit(weight, out=out) is out
        assert torch.equal(out, wanted)
    with pytest.raises(ValueError, match=r"out has dtype torch.bfloat16, but dtype=torch.float32"):
        ops.dequantize_4bit(weight, torch.float32, out=wanted)
    with pytest.raises(ValueError, match=r"out must have the weight's shape \[6, 50\], found \[300\]"):
        ops.dequantize_4bit(weight, out=wanted.flatten())


def test_out_with_permuted_inputs_is_checked_too():
    codes = torch.arange(512).view(8, 64) % 16
    permutation = torch.arange(64).flip(0)
    weight = ops.affine4_weight(codes, torch.ones(8, 2), permutation=permutation)
    out = torch.empty(8, 64)
    assert ops.dequantize_4bit(weight, out=out) is out and torch.equal(out, codes.flip(1) - 8.0)
    with pytest.raises(ValueError, match=r"out has dtype torch.float32, but dtype=torch.bfloat16"):
        ops.dequantize_4bit(weight, torch.bfloat16, out=out)
    with pytest.raises(ValueError, match=r"out must have the weight's shape \[8, 64\], found \[2, 8, 64\]"):
        ops.dequantize_4bit(weight, out=torch.empty(2, 8, 64))


def test_needs_no_gradient():
    weight = torch.nn.Parameter(data(4, 64))
    packed = ops.quantize_4bit(weight)
    assert not packed.codes.requires_grad and not packed.absmax.requires_grad


def operator_calls():
    x = data(5, 77)
    weight, nested = (ops.quantize_4bit(x, blocksize=32, double_quant=double).operands() for double in (False, True))
    namespace = torch.ops.peftcore
    return {
        "quantize": (namespace.quantize_4bit.default, (x, ops.NF4, 32), {}),
        "quantize transposed": (namespace.quantize_4bit.default, (x.t(), ops.NF4, 32), {}),
        "absmax": (namespace.quantize_absmax.default, (weight[0][1], ops.DYNAMIC8), {}),
        "dequantize": (namespace.dequantize_4bit.default, (*weight, torch.bfloat16), {}),
        "nested": (namespace.dequantize_4bit.default, (*nested, torch.float16), {}),
        "out": (namespace.dequantize_4bit.out, weight, {"out": torch.empty_like(x)}),
    }


@pytest.mark.parametrize("call", operator_calls())
def test_opcheck(call):
    torch.library.opcheck(*operator_calls()[call])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_without_a_graph_break():
    x = data(6, 64)

    def round_trip(x, buffer):
        weight, nested = ops.quantize_4bit(x * 2), ops.quantize_4bit(x, double_quant=True)
        ops.dequantize_4bit(nested, out=buffer)
        return ops.dequantize_4bit(weight) + 1, buffer + 1

    wanted = round_trip(x, torch.empty_like(x))
    found = torch.compile(round_trip, backend="aot_eager", fullgraph=True, dynamic=True)(x, torch.empty_like(x))
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_fake_tensors_have_the_right_shapes():
    with FakeTensorMode():
        codes, absmax = torch.ops.peftcore.quantize_4bit(torch.empty(3, 43), torch.empty(16))
        assert codes.shape == (65, 1) and absmax.shape == (3,) and codes.dtype == torch.uint8
        weight = PackedWeight(codes, absmax, torch.empty(16), (3, 43))
        y = ops.dequantize_4bit(weight, torch.half)
        assert y.shape == (3, 43) and y.dtype == torch.half
        with pytest.raises(ValueError, match="codes must hold 66"):
            ops.dequantize_4bit(weight._replace(shape=(3, 44)), torch.half)
