"""linear_4bit against float64, its gradients, autocast, torch.compile, panels, and arguments that do not fit."""

import sys

import pytest
import torch
from torch.nn import functional as F

from peftcore import ops
from peftcore.ops import linear_4bit as linear_4bit_function
from peftcore.ops.linear_4bit import PANEL_BYTES, Linear4bit, Linear4bitBackward

EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
SHAPES = [(48, 96), (5, 7), (1, 64), (33, 128), (3, 1), (1, 1)]


def weight(n, k, double_quant=True, blocksize=64, seed=0):
    """(a weight in 4 bits, the same in float64)."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    packed = ops.quantize_4bit(w, blocksize=blocksize, double_quant=double_quant)
    return packed, packed.values(torch.float64)


def inputs(shape, dtype=torch.float32, grad=True, seed=1):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.requires_grad_(grad)


@pytest.mark.parametrize("dtype", list(EPS), ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_values_and_gradients(n, k, double_quant, dtype):
    packed, dense = weight(n, k, double_quant)
    x, bias = inputs((2, 3, k), dtype), inputs((n,), dtype, seed=2)
    y = linear_4bit_function(x, packed, bias)
    assert y.dtype == dtype and y.shape == (2, 3, n)
    upstream = inputs(y.shape, dtype, grad=False, seed=3)
    y.backward(upstream)

    w = dense.to(dtype).double()  # each value is rounded once
    x64, up64 = x.detach().double(), upstream.double()
    # An error of a rounding of each factor's product, and one of the sum.
    magnitude = x64.abs() @ w.abs().T + bias.detach().double().abs()
    assert ((y.detach().double() - (x64 @ w.T + bias.detach().double())).abs() <= 2 * EPS[dtype] * magnitude).all()
    assert ((x.grad.double() - up64 @ w).abs() <= 2 * EPS[dtype] * (up64.abs() @ w.abs())).all()
    torch.testing.assert_close(bias.grad.double(), up64.flatten(0, 1).sum(0), rtol=4 * EPS[dtype], atol=8 * EPS[dtype])


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("n", "k", "blocksize"), [(67, 64, 64), (66, 320, 64), (65, 2880, 64), (99, 512, 128), (96, 96, 32)]
)
def test_few_rows_of_bf16_lose_less_than_a_weight_unpacked_into_bf16(n, k, blocksize, quant_type, level):
    """Rows that end within 128 columns, begin with any block, and lie in any place of a block of scales."""
    w = torch.randn(n + 300, k, generator=torch.Generator().manual_seed(0))
    for double_quant in (False, True):
        packed = ops.quantize_4bit(w, quant_type, blocksize=blocksize, double_quant=double_quant)
        first = packed.rows_that_begin_blocks()
        packed = packed.rows(first, first + n) if first <= 300 else packed
        dense, bias = packed.values(torch.float64), inputs(packed.shape[:1], torch.bfloat16, grad=False, seed=2)
        for rows in (1, 2, 3):
            x = inputs((rows, k), torch.bfloat16, grad=False)
            exact = x.double() @ dense.T + bias.double()
            peer = F.linear(x, dense.bfloat16(), bias).double()
            found = linear_4bit_function(x, packed, bias).double()
            assert (found - exact).norm() <= 1.1 * (peer - exact).norm()


def test_weights_with_many_codebooks_are_multiplied_in_turn(level):
    packed = weight(5, 64)[0]
    weights = [packed._replace(quant_map=packed.quant_map * factor) for factor in (1, 2, 3, 4, 5, 6)]
    for rows in (1, 4):
        x = inputs((rows, 64), torch.bfloat16, grad=False)
        for w in (*weights, *weights[::-1]):
            found, exact = ops.linear_4bit(x, w).double(), F.linear(x.double(), w.values(torch.float64))
            assert (found - exact).norm() <= 0.01 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "n", "k", "blocksize"), [(1, 67, 320, 64), (6, 21, 192, 128), (35, 9, 2880, 64)])
def test_rows_of_16_bits_lose_little_more_than_their_last_rounding(rows, n, k, blocksize, dtype, level):
    packed, dense = weight(n, k, blocksize=blocksize)
    x, bias = inputs((rows, k), dtype, grad=False), inputs((n,), dtype, grad=False, seed=2)
    exact = x.double() @ dense.T + bias.double()
    found = linear_4bit_function(x, packed, bias).double()
    peer = F.linear(x, dense.to(dtype), bias).double()
    assert (found - exact).norm() <= 1.1 * (peer - exact).norm()
    # Dot products of bf16, and PyTorch's own product for many rows of fp16, round the weight's values as the peer does.
    dots = level in ("avx512bf16", "neonbf16") and dtype == torch.bfloat16
    if dots or level in ("portable", "amx") or (rows == 35 and dtype == torch.float16):
        return
    rounded = (exact.to(dtype).double() - exact).norm()
    assert (found - exact).norm() <= (1.03 if dtype == torch.bfloat16 else 1.3) * rounded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spike", [2.0**15, torch.inf, torch.nan])
def test_a_value_far_above_those_beside_it_takes_no_bits_from_them(spike, dtype, level):
    """W is zero where the spike is, so that y is what the other values make."""
    n, k = 48, 256
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    w[:, 70] = 0
    packed = ops.quantize_4bit(w)
    x = inputs((3, k), dtype, grad=False)
    x[1, 70] = spike
    found, dense = linear_4bit_function(x, packed).double(), packed.values(torch.float64)
    if spike == 2.0**15:
        peer = F.linear(x, dense.to(dtype)).double()
        exact = x.double() @ dense.T
        assert (found - exact).norm() <= 1.1 * (peer - exact).norm()
    else:
        assert found[1].isnan().all()  # 0 times that
        assert found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_of_zeros_and_of_the_smallest_values(dtype, level):
    packed, dense = weight(33, 128)
    x = torch.zeros(4, 128, dtype=dtype)
    x[1, 3], x[2] = 2.0, torch.finfo(dtype).tiny * 2.0 ** (10 if dtype == torch.bfloat16 else 4)
    found = linear_4bit_function(x, packed)
    assert (found[[0, 3]] == 0).all()
    torch.testing.assert_close(found[1].double(), 2 * dense[:, 3], rtol=2 * EPS[dtype], atol=0)
    exact = x[2].double() @ dense.T
    smallest = torch.finfo(dtype).smallest_normal
    assert ((found[2].double() - exact).abs() <= 4 * EPS[dtype] * exact.abs().max() + 128 * smallest).all()


@pytest.mark.parametrize(("n", "k"), [(512, 64), (40, 1024), (300, 96), (64, 576)])
@pytest.mark.parametrize("double_quant", [False, True])
def test_panels_give_what_the_whole_weight_gives(n, k, double_quant, monkeypatch):
    packed, _ = weight(n, k, double_quant, blocksize=32)
    x, g, bias = inputs((2, 6, k), grad=False), inputs((2, 6, n), grad=False), inputs((n,), grad=False)
    whole = Linear4bit(x, *packed.operands(), bias).compute()
    whole_back = Linear4bitBackward(g, *packed.operands()).compute()
    for way in PANEL_BYTES:
        monkeypatch.setitem(PANEL_BYTES, way, 4096)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(Linear4bit(x, *packed.operands(), bias).compute(), whole, **close)
    torch.testing.assert_close(Linear4bitBackward(g, *packed.operands()).compute(), whole_back, **close)


def test_a_workspace_is_kept_and_given_back():
    packed, _ = weight(48, 96)
    Linear4bit(inputs((2, 96), grad=False), *packed.operands()).compute()
    state = sys.modules["peftcore.ops.linear_4bit"]._local
    kept = state.bytes
    assert kept.numel() >= 48 * 96 * 4
    Linear4bit(inputs((2, 96), torch.bfloat16, grad=False), *packed.operands()).compute()
    assert state.bytes is kept
    ops.free_workspace()
    assert state.bytes is None


def test_only_what_asks_for_it_gets_a_gradient():
    packed, _ = weight(8, 64)
    x = inputs((3, 64), grad=False)
    assert not linear_4bit_function(x, packed).requires_grad
    with torch.no_grad():
        assert not linear_4bit_function(x.clone().requires_grad_(), packed).requires_grad
    bias = inputs((8,))
    linear_4bit_function(x, packed, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((8,), 3.0)) and x.grad is None


def test_gradients_that_are_not_contiguous():
    packed, dense = weight(8, 64)
    x = inputs((3, 64))
    linear_4bit_function(x, packed).sum().backward()  # an expanded one
    torch.testing.assert_close(x.grad.double(), dense.sum(0).expand(3, 64), rtol=1e-5, atol=1e-5)
    transposed = inputs((64, 3), grad=False).T
    torch.testing.assert_close(
        linear_4bit_function(transposed, packed).double(),
        transposed.double() @ dense.T,
        rtol=1e-5,
        atol=1e-5,
    )


def test_it_is_differentiated_twice() -> None:
    packed, dense = weight(8, 64)
    x = inputs((3, 64))
    second = []
    for y in (linear_4bit_function(x, packed), x @ dense.float().T):
        (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*second, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_as_for_a_dense_linear(dtype):
    packed, dense = weight(8, 64)
    x, bias = inputs((3, 64)), inputs((8,), grad=False)
    with torch.autocast("cpu", dtype):
        found = linear_4bit_function(x, packed, bias)
        wanted = F.linear(x, dense.float(), bias)
    assert found.dtype == wanted.dtype == dtype
    # Where a kernel keeps more of the weight's bits than the dense product has, they differ by what that rounds.
    magnitude = x.detach().abs().double() @ dense.abs().T + bias.abs().double()
    assert ((found.double() - wanted.double()).abs() <= 2 * EPS[dtype] * magnitude).all()
    found.sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch's own tracing does
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    packed, _ = weight(8, 64)
    x, bias = inputs((3, 64)), inputs((8,))

    def loss(x, bias):
        return linear_4bit_function(x * 2, packed, bias).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    wanted = torch.autograd.grad(loss(x, bias), (x, bias))
    found = torch.autograd.grad(compiled(x, bias), (x, bias))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("double_quant", [False, True])
def test_opcheck(double_quant):
    packed, _ = weight(9, 66, double_quant)
    x, grad = inputs((3, 66), grad=False), inputs((2, 9), grad=False)
    torch.library.opcheck(torch.ops.peftcore.linear_4bit, (x, *packed.operands(), torch.ones(9)))
    torch.library.opcheck(torch.ops.peftcore.linear_4bit_backward, (grad, *packed.operands()))


@pytest.mark.parametrize(("n", "k", "rows"), [(8, 64, 0), (0, 64, 3), (8, 0, 3)])
def test_nothing_in_or_out(n, k, rows):
    packed, _ = weight(n, k)
    x = inputs((rows, k))
    y = linear_4bit_function(x, packed, torch.ones(n))
    assert y.shape == (rows, n) and torch.equal(y, torch.ones(rows, n)) == (rows == 0 or k == 0 or n == 0)
    y.sum().backward()
    assert x.grad.shape == (rows, k)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3, 63)}, ValueError, r"x must be \[.., 64\] for a weight \[8, 64\], found \[3, 63\]"),
        ({"x": torch.ones(3, 64, dtype=torch.int64)}, TypeError, "only float32, float16 and bfloat16"),
        ({"x": torch.tensor(1.0)}, ValueError, "at least one dimension"),
        ({"bias": torch.ones(7)}, ValueError, r"bias must be \[8\], found \[7\]"),
        ({"shape": (9, 64)}, ValueError, r"codes must hold 288 elements \(two values a byte\), found 256"),
        ({"shape": (2, 4, 64)}, ValueError, r"weight must be \[out, in\], found \[2, 4, 64\]"),
        ({"codes": torch.zeros(256, 1)}, TypeError, "codes must be (torch.uint8|Byte)"),
    ],
)
@pytest.mark.parametrize("call", ["operator", "reference"])
def test_arguments_that_do_not_fit(call, change, error, message):
    packed, _ = weight(8, 64)
    packed = packed._replace(**{name: value for name, value in change.items() if name in packed._fields})
    operator = torch.ops.peftcore.linear_4bit if call == "operator" else Linear4bit
    with pytest.raises(error, match=message):
        operator(change.get("x", torch.ones(3, 64)), *packed.operands(), change.get("bias"))


@pytest.mark.parametrize("call", ["operator", "reference"])
def test_a_gradient_that_does_not_fit_and_a_dense_weight(call):
    packed, dense = weight(8, 64)
    backward = torch.ops.peftcore.linear_4bit_backward if call == "operator" else Linear4bitBackward
    with pytest.raises(ValueError, match=r"grad must be \[.., 8\] for a weight \[8, 64\], found \[3, 64\]"):
        backward(torch.ones(3, 64), *packed.operands())
    with pytest.raises(ValueError, match=r"the weight must be in 4 bits, found a dense one of shape \[8, 64\]"):
        backward(torch.ones(3, 8), [dense.float()], [])
