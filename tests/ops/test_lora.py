"""lora_linear against float64: values and gradients at every SIMD level, its dropout, and arguments that do not fit."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from support.levels import LEVELS, at_level
from support.operands import near, packed, values
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from peftcore import ops
from peftcore.ops import keep_mask, lora_linear
from peftcore.ops.lora import LoraLinear, LoraLinearBackward

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SEED = torch.tensor(2**62 + 12345)


def check(x, w, bias, a, b, p=0.0, scale=0.7, seed=SEED, weight=None):
    """y and all gradients of lora_linear against the formula in float64, of the factors as they are."""
    dtype, seed = x.dtype, seed if p else None
    upstream = values((*x.shape[:-1], b.shape[0]), dtype, seed=7)
    inputs = [t.detach().requires_grad_() for t in (x, bias, a, b)]
    y = lora_linear(inputs[0], w if weight is None else weight, inputs[1], *inputs[2:], scale, p, seed)
    grads = torch.autograd.grad(y, inputs, upstream)

    def flat(t):
        return t.double().reshape(t.shape[:-1].numel(), t.shape[-1])

    x64, g, w64 = flat(x), flat(upstream), w.to(dtype).double()
    a64, b64 = a.double(), b.double()
    keep = keep_mask(*x64.shape, p, seed).double() if p else torch.ones_like(x64)
    c = scale * 65536 / (65536 - round(65536 * p))
    kept = keep * x64
    s, s_abs = c * kept @ a64.T, c * kept.abs() @ a64.T.abs()
    t, t_abs = c * g @ b64, c * g.abs() @ b64.abs()
    base_abs = x64.abs() @ w64.T.abs() + bias.double().abs()
    packs = weight is not None  # some kernels round its values to x's dtype, some do not
    near(
        y.detach(),
        (x64 @ w64.T + bias.double() + s @ b64.T).view(y.shape),
        (base_abs + s_abs @ b64.T.abs()).view(y.shape),
        (base_abs if packs else (x64 @ w64.T + bias.double()).abs()).view(y.shape),
    )
    near(
        grads[0],
        (g @ w64 + keep * (t @ a64)).view(x.shape),
        (g.abs() @ w64.abs() + keep * (t_abs @ a64.abs())).view(x.shape),
        (g.abs() @ w64.abs() if packs else (g @ w64).abs()).view(x.shape),
    )
    near(grads[1], g.sum(0), g.abs().sum(0))
    near(grads[2], t.T @ kept, t_abs.T @ kept.abs())
    near(grads[3], g.T @ s, g.abs().T @ s_abs)
    assert [grad.dtype for grad in grads] == [dtype, dtype, a.dtype, b.dtype]


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "n", "r"),
    [((1, 1), 1, 1), ((2, 3, 7), 5, 2), ((33, 75), 41, 17), ((130, 288), 300, 16), ((9, 64), 33, 256), ((5,), 3, 8)],
)
def test_values_and_gradients(level, shape, n, r, dtype, p):
    k = shape[-1]
    check(values(shape, dtype), values((n, k), dtype, 2), values((n,), dtype, 3), values((r, k)), values((n, r)), p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e-5, 3e4], ids=["small gradients", "large sums"])
def test_no_gradient_loses_what_x_cannot_hold(level, dtype, size):
    """T below fp16's smallest number, S above its largest; in bf16, 16 bits of both and of A and B."""
    x, w, b = values((130, 96), dtype), values((70, 96), dtype, 2), values((70, 16), seed=3) * 1e-3
    a = (values((16, 96), seed=4) * (size if size > 1 else 1)).requires_grad_()
    upstream = (values((130, 70), seed=5) * min(size, 1e-2)).to(dtype)
    b = (b / (size if size > 1 else 1)).requires_grad_()
    da, db = torch.autograd.grad(lora_linear(x, w, None, a, b, 0.5), (a, b), upstream)
    g, x64 = upstream.double(), x.double()
    for found, exact in ((da, (0.5 * g @ b.double()).T @ x64), (db, g.T @ (0.5 * x64 @ a.double().T))):
        assert (found.double() - exact).norm() <= (1e-5 if dtype is torch.bfloat16 else 1e-6) * exact.norm()


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "k", "n", "r"),
    [
        (1600, 96, 40, 5),
        (70, 2112, 300, 40),
        (97, 2048, 65, 16),
        (33, 80, 2080, 33),
        (300, 288, 544, 256),
        (40, 64, 48, 700),
        (33, 64, 48, 1056),
    ],
    ids=[
        "rows",
        "columns of x",
        "columns that share a set of the cache",
        "rows of W",
        "r",
        "r beyond a chunk of pairs",
        "r beyond it, of whole tiles",
    ],
)
def test_more_than_one_block_of_anything(level, rows, k, n, r, dtype, p):
    check(values((rows, k), dtype), values((n, k), dtype, 2), values((n,), dtype, 3), values((r, k)), values((n, r)), p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "k", "r"), [(1, 128, 16), (4, 2112, 20), (16, 128, 8), (32, 192, 40)])
def test_few_rows_beside_a_packed_weight(level, rows, k, r, dtype):
    """Where the thin product follows parts of y as they are written, by rows of W that are no whole number of parts."""
    weight, dense = packed(600, k)
    check(values((rows, k), dtype), dense, values((600,), dtype, 3), values((r, k)), values((600, r)), weight=weight)


def test_sums_over_rows_that_outgrow_their_memory():
    """r so large that groups of rows are fewer and larger, and columns are divided."""
    rows, n, r = 600, 14336, 256
    grad, s, x = values((rows, n)), values((rows, r), seed=2), values((rows, 1))
    a, b, w = values((r, 1)), values((n, r)), values((n, 1))
    backward = torch.ops.peftcore.lora_linear_backward
    _, da, db = backward(grad, x, s, [w], [], a, b, [False, True, True], 1.0)
    near(db, grad.double().T @ s.double(), grad.double().abs().T @ s.double().abs())
    t, t_abs = grad.double() @ b.double(), grad.double().abs() @ b.double().abs()
    near(da, t.T @ x.double(), t_abs.T @ x.double().abs())


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_nan_that_an_earlier_call_left_in_the_workspace_does_not_show(level, p):
    rows, k, n, r = 40, 72, 70, 5  # of all, less than whole tiles
    big = [values(shape, torch.bfloat16).fill_(torch.nan) for shape in ((200, 2112), (160, 2112))]
    factors = values((40, 2112)).fill_(torch.nan), values((160, 40)).fill_(torch.nan)
    spoiled = [t.requires_grad_() for t in (big[0], *factors)]
    y = lora_linear(spoiled[0], big[1], None, *spoiled[1:], 1.0, p, SEED if p else None)
    assert y.isnan().all()
    assert all(grad.isnan().any() for grad in torch.autograd.grad(y, spoiled, torch.ones_like(y)))
    bias = values((n,), torch.bfloat16, 3)
    check(values((rows, k), torch.bfloat16), values((n, k), torch.bfloat16, 2), bias, values((r, k)), values((n, r)), p)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 70),
    k=st.integers(1, 90),
    n=st.integers(1, 90),
    r=st.one_of(st.integers(1, 40), st.just(256)),
    dtype=st.sampled_from(DTYPES),
    factors=st.sampled_from([torch.float32, None]),
    p=st.sampled_from([0.0, 0.1, 0.9]),
    layout=st.sampled_from(["contiguous", "transposed", "expanded", "strided"]),
    level=st.sampled_from(LEVELS),
)
def test_odd_shapes_and_strides(rows, k, n, r, dtype, factors, p, layout, level):
    x = {
        "contiguous": lambda: values((rows, k), dtype),
        "transposed": lambda: values((k, rows), dtype).T,
        "expanded": lambda: values((1, k), dtype).expand(2, rows, k),
        "strided": lambda: values((rows, 2 * k), dtype)[:, ::2],
    }[layout]()
    a, b = values((r, k), factors or dtype, 4), values((n, r), factors or dtype, 5)
    with at_level(level):
        check(x, values((n, k), dtype, 2), values((n,), dtype, 3), a, b, p)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 48, 128), (4, 48, 128), (40, 48, 128), (70, 300, 2112)])
def test_a_weight_in_4_bits(level, rows, n, k, dtype, double_quant):
    weight, dense = packed(n, k, double_quant)
    arguments = values((n,), dtype, 3), values((8, k)), values((n, 8))
    check(values((rows, k), dtype), dense, *arguments, 0.3, weight=weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "r", "factors"), [(1, 16, None), (3, 5, torch.bfloat16), (7, 130, torch.float64)])
def test_few_rows_by_a_weight_in_4_bits(level, rows, r, factors, dtype):
    """Threads take parts of A, then rows of W, then of B. Who took what changes no bit of ours, so W is zero."""
    weight, dense = packed(300, 2112, True)
    x, bias = values((rows, 2112), dtype), values((300,), dtype, 3)
    a, b = values((r, 2112)).to(factors), values((300, r)).to(factors)
    check(x, dense, bias, a, b, 0.0, weight=weight)
    tensors, packing = ops.quantize_4bit(torch.zeros(300, 2112), double_quant=True).operands()
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results += torch.ops.peftcore.lora_linear(x, tensors, packing, bias, a, b, 0.5)
    torch.set_num_threads(before)
    assert all(torch.equal(found, results[i % 2]) for i, found in enumerate(results))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck(p):
    def inputs(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    w = torch.randn(5, 7, dtype=torch.float64)
    arguments = inputs(2, 3, 7), inputs(5), inputs(4, 7), inputs(5, 4)
    assert torch.autograd.gradcheck(lambda x, bias, a, b: lora_linear(x, w, bias, a, b, 0.7, p, SEED), arguments)


@pytest.mark.parametrize("columns", [8, 37, 300])
def test_kernels_drop_what_the_mask_says(level, columns):
    """x of ones and A the identity: S is the mask itself."""
    for dtype in DTYPES:
        x, eye = torch.ones(50, columns, dtype=dtype), torch.eye(columns)
        w, b = torch.zeros(1, columns, dtype=dtype), torch.zeros(1, columns)
        _, s = torch.ops.peftcore.lora_linear(x, [w], [], None, eye, b, 0.75, 0.25, SEED)
        assert torch.equal(s.bool(), keep_mask(50, columns, 0.25, SEED))
        assert torch.equal(s.unique(), torch.tensor([0.0, 1.0], dtype=dtype))


def test_dropout_follows_the_generator_and_is_recomputed():
    x, w, a, b = values((6, 64)), values((8, 64)), values((4, 64), grad=True), values((8, 4), grad=True)

    def forward(x):
        return lora_linear(x, w, None, a, b, 1.0, 0.5)

    torch.manual_seed(3)
    first = forward(x)
    assert not torch.equal(forward(x), first)
    torch.manual_seed(3)
    assert torch.equal(forward(x), first)
    torch.manual_seed(3)
    plain = torch.autograd.grad(forward(x).square().sum(), (a, b))
    torch.manual_seed(3)
    again = torch.autograd.grad(checkpoint(forward, x, use_reentrant=False).square().sum(), (a, b))
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(level, dtype):
    """Of the thin products and, with AMX, of all; the library's own is its business, so W is zero."""
    ours = level == "amx" and dtype is torch.bfloat16
    x, w, grad = values((300, 200), dtype), values((150, 200), dtype) * ours, values((300, 150), dtype)
    a, b = values((16, 200)), values((150, 16))
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y, s = torch.ops.peftcore.lora_linear(x, [w], [], None, a, b, 1.0, 0.1, SEED)
        back = torch.ops.peftcore.lora_linear_backward(grad, x, s, [w], [], a, b, [True] * 3, 1.0, 0.1, SEED)
        results.append((y, s, *back))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_only_what_asks_for_it_gets_a_gradient():
    x, w, a, b = values((3, 64)), values((8, 64)), values((4, 64)), values((8, 4))
    assert not lora_linear(x, w, None, a, b).requires_grad
    for i in range(3):
        inputs = [x.clone(), a.clone(), b.clone()]
        inputs[i].requires_grad_()
        lora_linear(inputs[0], w, None, *inputs[1:]).sum().backward()
        assert [t.grad is not None for t in inputs] == [i == j for j in range(3)]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_it_is_differentiated_twice(quantized, p):
    weight, dense = packed(8, 64)
    leaves = values((3, 64), grad=True), values((4, 64), grad=True), values((8, 4), grad=True)
    x, a, b = leaves
    seed = torch.tensor(7)
    kept = keep_mask(3, 64, p, seed) / (1 - p)
    second = []
    for y in (
        lora_linear(x, weight if quantized else dense.float(), None, a, b, 0.5, p, seed if p else None),
        x @ dense.float().T + 0.5 * (x * kept) @ a.T @ b.T,
    ):
        first = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
        second.append(torch.autograd.grad(sum(each.square().sum() for each in first), leaves))
    for found, wanted in zip(*second, strict=True):
        assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_it_is_not_differentiated_twice_where_x_is_not_kept():
    x, b = values((3, 64), grad=True), values((8, 4), grad=True)
    y = lora_linear(x, values((8, 64)), None, values((4, 64)), b).square().sum()
    with pytest.raises(RuntimeError, match="does not save x if A is frozen"):
        torch.autograd.grad(y, [x, b], create_graph=True)
    y = lora_linear(x, values((8, 64)), None, values((4, 64)), values((8, 4))).square().sum()
    assert torch.autograd.grad(y, x, create_graph=True)[0].requires_grad


@pytest.mark.parametrize("quantized", [False, True])
def test_autocast_computes_in_its_dtype(quantized):
    weight, dense = packed(8, 64)
    weight = weight if quantized else dense.float()
    x, a, b = values((3, 64), grad=True), values((4, 64), grad=True), values((8, 4), grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = lora_linear(x, weight, values((8,)), a, b)
        wanted = F.linear(x, dense.float(), values((8,))) + F.linear(F.linear(x, a), b)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.3)
    found.sum().backward()
    assert x.grad.dtype == a.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch's own tracing does
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic, p):
    w, x, a, b = values((8, 64)), values((3, 64)), values((4, 64), grad=True), values((8, 4), grad=True)

    def loss(x, a, b):
        return lora_linear(x * 2, w, None, a, b, 0.5, p).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    torch.manual_seed(1)
    wanted = torch.autograd.grad(loss(x, a, b), (a, b))
    torch.manual_seed(1)
    found = torch.autograd.grad(compiled(x, a, b), (a, b))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantized", [False, True])
def test_opcheck(dtype, quantized):
    x, a, b = values((3, 7), dtype), values((4, 7)), values((5, 4))
    w = packed(5, 7)[0].operands() if quantized else ([values((5, 7), dtype)], [])
    operators = torch.ops.peftcore
    torch.library.opcheck(operators.lora_linear, (x, *w, values((5,), dtype), a, b, 0.5, 0.2, SEED))
    arguments = (values((3, 5), dtype), x, values((3, 4)), *w, a, b, [True, True, False], 0.5, 0.2, SEED)
    torch.library.opcheck(operators.lora_linear_backward, arguments)
    index = torch.tensor([0, -1, 0])
    torch.library.opcheck(operators.lora_linear_per_sample, (x, *w, None, [a], [b], [0.5], index))


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "k", "rows", "r"), [(8, 64, 0, 4), (0, 64, 3, 4), (8, 0, 3, 4), (8, 0, 40, 4), (8, 64, 3, 0)]
)
def test_nothing_in_or_out(level, n, k, rows, r, dtype, p):
    x, w, bias = values((rows, k), dtype), values((n, k), dtype), values((n,), dtype)
    check(x, w, bias, values((r, k)), values((n, r)), p)


def test_the_reference_computes_what_the_kernels_do():
    x, w, a, b = values((9, 40)), values((6, 40)), values((4, 40)), values((6, 4))
    given = x, [w], [], None, a, b, 0.5, 0.2, SEED
    found = torch.ops.peftcore.lora_linear(*given)
    torch.testing.assert_close(found, LoraLinear(*given).compute())
    given = (values((9, 6)), x, found[1], [w], [], a, b, [True, True, True], 0.5, 0.2, SEED)
    torch.testing.assert_close(torch.ops.peftcore.lora_linear_backward(*given), LoraLinearBackward(*given).compute())


def arguments(**change):
    given = {"x": torch.ones(3, 64), "weight": torch.ones(8, 64), "bias": None}
    return {**given, "a": torch.ones(4, 64), "b": torch.ones(8, 4), **change}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3, 63)}, ValueError, r"x must be \[.., 64\] for a weight \[8, 64\], found \[3, 63\]"),
        ({"weight": torch.ones(2, 8, 64)}, ValueError, r"weight must be \[out, in\], found \[2, 8, 64\]"),
        ({"b": torch.ones(9, 4)}, ValueError, r"b must be \[8, 4\], found \[9, 4\]"),
        ({"x": torch.ones(3, 64, dtype=torch.int64)}, TypeError, "only float32, float16 and bfloat16"),
        ({"x": torch.tensor(1.0)}, ValueError, "at least one dimension"),
        ({"weight": torch.ones(8, 64).bfloat16()}, TypeError, "weight must be .* like x, found .*BFloat16|bfloat16"),
        ({"bias": torch.ones(7)}, ValueError, r"bias must be \[8\], found \[7\]"),
        ({"a": torch.ones(4, 65)}, ValueError, r"a must be \[r, 64\] for x, found \[4, 65\]"),
        ({"a": torch.ones(4)}, ValueError, r"a must have two dimensions, found \[4\]"),
        (
            {"a": torch.ones(4, 64, dtype=torch.int64)},
            TypeError,
            "a must be a 16-, 32- or 64-bit floating-point tensor",
        ),
        ({"b": torch.ones(8, 5)}, ValueError, r"b must be \[8, 4\], found \[8, 5\]"),
        ({"a": torch.ones(4, 64, device="meta")}, ValueError, "a must be on cpu like x, found meta"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), found 1"),
        ({"dropout_p": 0.5, "seed": torch.tensor(1.0)}, TypeError, "seed must be"),
        ({"dropout_p": 0.5, "seed": torch.tensor([1, 2])}, ValueError, "seed must hold 1 element, found 2"),
        ({"dropout_p": 0.5, "seed": torch.tensor(1, device="meta")}, ValueError, "seed must be on cpu, found meta"),
    ],
)
def test_arguments_that_do_not_fit(change, error, message):
    with pytest.raises(error, match=message):
        lora_linear(**arguments(**change))


@pytest.mark.parametrize("call", ["operator", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad": torch.tensor(1.0)}, ValueError, r"grad must be \[3, 8\], found \[\]"),
        ({"grad": torch.ones(3, 9)}, ValueError, r"grad must be \[3, 8\], found \[3, 9\]"),
        ({"grad": torch.ones(3, 8).half()}, TypeError, "grad must be .* like x, found .*[Hh]alf|float16"),
        ({"s": torch.tensor(1.0)}, ValueError, r"s must be \[3, 4\], found \[\]"),
        ({"s": torch.ones(4, 3)}, ValueError, r"s must be \[3, 4\], found \[4, 3\]"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must have at least one dimension"),
        ({"b": torch.tensor(1.0)}, ValueError, r"b must have two dimensions, found \[\]"),
    ],
)
def test_gradients_of_arguments_that_do_not_fit(call, change, error, message):
    given = {**arguments(), "grad": torch.ones(3, 8), "s": torch.ones(3, 4), "needs": [True] * 3, "scale": 1.0}
    given |= {"weight": [given.pop("weight")], "packing": []}
    del given["bias"]
    backward = torch.ops.peftcore.lora_linear_backward if call == "operator" else LoraLinearBackward
    with pytest.raises(error, match=message):
        backward(**{**given, **change})
