"""Linear layers of experts against float64: values and gradients at every SIMD level, and arguments that do not fit."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from support.levels import LEVELS, at_level
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from peftcore import ops
from peftcore.ops.grouped_operators import GroupedLinear, GroupedLinearBackward

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
SEED = torch.tensor(2**62 + 12345)
OPS = torch.ops.peftcore


def values(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ends(counts):
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def near(name, found, exact, magnitude, base):
    """Sums as of 16 bits or more, rounded to found's dtype, twice where the base's product was rounded before."""
    if found.numel() == 0:
        return
    smallest = 2.0**-24 if found.dtype is torch.float16 else torch.finfo(found.dtype).tiny
    bound = 2.0**-16 * magnitude + EPS[found.dtype] / 2 * (exact.abs() + base) + smallest
    assert found.shape == exact.shape, name
    assert ((found.double() - exact).abs() <= bound).all(), name


def check(
    counts, out, width, r, dtype, *, transposed=False, packs=None, p=0.0, behind=2, factors=torch.float32, exactly=True
):
    """Both operators against their formula in float64, of what they were given; or what they give."""
    experts, rows, seed = len(counts), sum(counts) + behind, SEED if p else None
    stored = values(experts, *((width, out) if transposed else (out, width)), seed=1, dtype=dtype)
    weight, packing, dense = [stored], [], stored.double()
    if packs is not None:
        packed = ops.quantize_4bit(stored.float(), blocksize=64 if width % 64 == 0 else 32, double_quant=packs)
        (weight, packing), dense = packed.operands(), packed.values(torch.float64)
    x, bias, grad = (
        values(*s, seed=2 + i, dtype=dtype) for i, s in enumerate([(rows, width), (experts, out), (rows, out)])
    )
    thin = (
        [values(experts, r, width, seed=5, dtype=factors), values(experts, out, r, seed=6, dtype=factors)] if r else []
    )
    numbers = transposed, 0.7, p, seed
    y, s = OPS.grouped_linear(x, ends(counts), weight, packing, bias, thin, *numbers)
    thin_s = [*thin, s] if thin else []
    needs = [True, bool(thin), bool(thin)]
    back = transposed, needs, *numbers[1:]
    found = OPS.grouped_linear_backward(grad, x if thin else None, ends(counts), weight, packing, thin_s, *back)

    if not exactly:
        return y, s, *found

    def exact(of=lambda t: t.double(), with_thin=True):
        f, drop = ([of(t) for t in thin], numbers[2:]) if with_thin and thin else ([], (0.0, None))
        y, s = GroupedLinear(of(x), ends(counts), [of(dense)], [], of(bias), f, *numbers[:2], *drop).compute()
        given = of(grad), of(x) if f else None, ends(counts), [of(dense)], [], [*f, s] if f else [], transposed
        gradients = GroupedLinearBackward(*given, [True, bool(f), bool(f)], numbers[1], *drop).compute()
        return [y, s, *gradients]

    magnitudes, bases = exact(lambda t: t.double().abs()), exact(with_thin=False)
    # Some kernels round a packed weight to x's dtype, some do not.
    bases = [b.abs() if packs is None else m for b, m in zip(bases, magnitudes, strict=True)]
    rows_of = zip(("y", "s", "dx", "da", "db"), (y, s, *found), exact(), magnitudes, bases, strict=True)
    for name, one, other, magnitude, base in rows_of:
        near(name, one, other, magnitude, base if name in ("y", "dx") else torch.zeros_like(other))
    return None


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("counts", [(3, 0, 5), (0, 0, 4), (1, 1, 1), (0, 0, 0)])
def test_equals_a_loop_over_experts_with_its_gradients(counts, transposed):
    rows, width, out, r = sum(counts) + 2, 6, 4, 3
    x, bias = values(rows, width), values(3, out, seed=2)
    w, a, b = values(3, out, width, seed=1), values(3, r, width, seed=3), values(3, out, r, seed=4)
    offsets = ends(counts)

    def by_loop(x, bias, a, b):
        parts, begin = [], 0
        for e, count in enumerate(counts):
            rows_of = x[begin : begin + count]
            parts.append(F.linear(rows_of, w[e], bias[e]) + 0.5 * rows_of @ a[e].T @ b[e].T)
            begin += count
        return torch.cat([*parts, x.new_zeros(2, out)])

    stored = w.mT.contiguous() if transposed else w
    inputs = [t.requires_grad_() for t in (x, bias, a, b)]
    y = ops.grouped_lora_linear(x, offsets, stored, bias, a, b, transposed, 0.5)
    torch.testing.assert_close(y, by_loop(*inputs))
    grad = values(rows, out, seed=5)
    wanted = torch.autograd.grad(by_loop(*inputs), inputs, grad, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(torch.autograd.grad(y, inputs, grad), wanted)


@pytest.mark.parametrize("packs", [None, False, True], ids=["dense", "4 bits", "nested"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("counts", "out", "width", "r", "p"),
    [
        ((3, 0, 70, 1), 96, 160, 16, 0.25),
        ((0, 9, 0, 33, 12), 300, 64, 0, 0.0),
        ((300,), 64, 128, 64, 0.1),  # one expert, more rows than a group of sums
        ((1,), 32, 64, 1, 0.0),
    ],
)
def test_values_and_gradients(level, counts, out, width, r, p, dtype, transposed, packs):
    check(counts, out, width, r, dtype, transposed=transposed, packs=packs, p=p)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    out=st.integers(1, 70),
    width=st.integers(1, 70),
    r=st.integers(0, 64),
    dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
    p=st.sampled_from([0.0, 0.3]),
    behind=st.integers(0, 3),
    factors=st.sampled_from([torch.float32, torch.bfloat16]),
    level=st.sampled_from(LEVELS),
)
def test_odd_shapes(counts, out, width, r, dtype, transposed, p, behind, factors, level):
    given = {"transposed": transposed, "p": p if r else 0.0, "behind": behind, "factors": factors}
    with at_level(level):
        check(counts, out, width, r, dtype, **given)


@pytest.mark.parametrize("packs", [None, True], ids=["dense", "4 bits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_no_bit(level, dtype, packs):
    """An expert with most of the rows is divided among threads, others go to one each."""
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        given = {"p": 0.1, "packs": packs, "exactly": False}
        results.append([check(counts, 320, 64, 8, dtype, **given) for counts in [(2, 260, 0, 17), (1, 2, 3, 4, 5, 6)]])
    torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert all(map(torch.equal, one, two))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_in_any_layout(level, dtype):
    """Of a transposed parameter, and of every second expert and column, where they lie."""
    x, offsets = values(7, 64, dtype=dtype), ends((3, 4))
    w = values(2, 96, 64, seed=1, dtype=dtype)
    wide = torch.zeros(4, 96, 128, dtype=dtype)
    wide[::2, :, ::2] = w
    wanted = OPS.grouped_linear(x, offsets, [w], [], None, [])[0]
    for stored in (w.mT.contiguous().mT, wide[::2, :, ::2]):
        assert stored.shape == w.shape and not stored.is_contiguous()
        torch.testing.assert_close(OPS.grouped_linear(x, offsets, [stored], [], None, [])[0], wanted)
    across = values(64, 14, dtype=dtype).T[::2]
    found = OPS.grouped_linear(across, offsets, [w], [], None, [])[0]
    torch.testing.assert_close(found, OPS.grouped_linear(across.contiguous(), offsets, [w], [], None, [])[0])


def test_what_has_no_rows_is_not_read(level):
    """Experts without rows may hold anything; rows behind the last offset are zero, whatever memory held."""
    w = values(3, 64, 64, seed=1, dtype=torch.bfloat16)
    w[1] = torch.nan
    x, a, b = values(9, 64, dtype=torch.bfloat16), values(3, 4, 64).float(), values(3, 64, 4).float()
    a[1] = b[1] = x[7:] = torch.nan
    offsets, numbers = ends((3, 0, 4)), (1.0, 0.0, None)
    for _ in range(3):
        spoiled = [torch.full((9, 64), torch.nan, dtype=torch.bfloat16) for _ in range(4)]
        del spoiled
        y, s = OPS.grouped_linear(x, offsets, [w], [], None, [a, b], False, *numbers)
        dx, da, db = OPS.grouped_linear_backward(x, x, offsets, [w], [], [a, b, s], False, [True] * 3, *numbers)
        for t in (y, s, dx):
            assert not t.isnan().any() and (t[7:] == 0).all()
        for t in (da, db):
            assert not t.isnan().any() and (t[1] == 0).all()


@pytest.mark.parametrize("hostile", [[4, 3, 9], [-1, 2, 3], [0, 0, 10], [2**31 - 1] * 3, [-(2**31), 0, 9]], ids=str)
@pytest.mark.parametrize("level", LEVELS[:1] + LEVELS[-1:], indirect=True)
def test_offsets_that_do_not_rise_or_end_behind_the_rows(level, hostile):
    x, offsets, w = values(9, 64).float(), torch.tensor(hostile, dtype=torch.int32), values(3, 64, 64).float()
    with pytest.raises(ValueError, match=r"offsets must rise from 0 to 9, found .* at"):
        OPS.grouped_linear(x, offsets, [w], [], None, [])
    with pytest.raises(ValueError, match=r"offsets must rise from 0 to 9, found .* at"):
        OPS.grouped_linear_backward(x, None, offsets, [w], [], [], False, [True, False, False])
    with pytest.raises(ValueError, match=r"offsets must rise from 0 to 9, found .* at"):
        GroupedLinear(x, offsets, [w], [], None, []).compute()


def arguments(**change):
    given = {"x": torch.ones(3, 64), "offsets": ends((1, 2)), "weight": [torch.ones(2, 8, 64)], "packing": []}
    given |= {"bias": None, "factors": [torch.ones(2, 4, 64), torch.ones(2, 8, 4)], "transposed": False}
    return {**given, "scale": 1.0, "dropout_p": 0.0, "seed": None, **change}


PACKED = ops.quantize_4bit(torch.ones(2, 3, 16)).operands()


@pytest.mark.parametrize("call", [OPS.grouped_linear, GroupedLinear], ids=["operator", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3, 63)}, ValueError, r"x must be \[rows, 64\], found \[3, 63\]"),
        ({"x": torch.ones(1, 3, 64)}, ValueError, r"x must be \[rows, 64\], found \[1, 3, 64\]"),
        ({"x": torch.ones(3, 64, dtype=torch.int64)}, TypeError, "only float32, float16 and bfloat16"),
        ({"weight": [torch.ones(8, 64)]}, ValueError, r"dimensions for experts, out and in, found \[8, 64\]"),
        ({"weight": [torch.ones(2, 8, 64).half()]}, TypeError, "weight must be .* like x"),
        ({"weight": [torch.ones(2, 8, 64, device="meta")]}, ValueError, "weight must be on cpu like x, found meta"),
        ({"weight": PACKED[0], "packing": PACKED[1]}, ValueError, "whole blocks of 64, found 48 values in each"),
        ({"offsets": ends((1, 2)).long()}, TypeError, "offsets must be .*[Ii]nt.*, found .*[Ll]ong|int64"),
        ({"offsets": ends((1, 1, 1))}, ValueError, r"offsets must be \[2\], found \[3\]"),
        ({"offsets": torch.ones(2, dtype=torch.int32, device="meta")}, ValueError, "offsets must be on cpu like x"),
        ({"bias": torch.ones(8)}, ValueError, r"bias must be \[2, 8\], found \[8\]"),
        ({"bias": torch.ones(2, 8).half()}, TypeError, "bias must be .* like x"),
        ({"factors": [torch.ones(2, 4, 64)]}, ValueError, r"factors must be \[a, b\] or \[\], found 1"),
        ({"factors": [torch.ones(4, 64), torch.ones(2, 8, 4)]}, ValueError, r"a must have three dimensions"),
        ({"factors": [torch.ones(2, 4, 64)] * 2}, ValueError, r"b must be \[2, 8, 4\], found \[2, 4, 64\]"),
        ({"factors": [torch.ones(2, 4, 63), torch.ones(2, 8, 4)]}, ValueError, r"a must be \[2, r, 64\]"),
        ({"factors": [torch.ones(2, 4, 64).int(), torch.ones(2, 8, 4)]}, TypeError, "a must be a 16-, 32- or 64-bit"),
        ({"dropout_p": 0.5}, ValueError, "dropout_p=0.5 needs a seed, found none"),
        ({"dropout_p": 0.5, "seed": torch.tensor(1.0)}, TypeError, "seed must be"),
    ],
)
def test_arguments_that_do_not_fit(call, change, error, message):
    with pytest.raises(error, match=message):
        call(**arguments(**change))


@pytest.mark.parametrize("call", [OPS.grouped_linear_backward, GroupedLinearBackward], ids=["operator", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad": torch.ones(3, 9)}, ValueError, r"grad must be \[rows, 8\], found \[3, 9\]"),
        ({"x": None}, TypeError, "x must be a tensor if there are factors, found None"),
        ({"x": torch.ones(4, 64)}, ValueError, r"x must be \[3, 64\], found \[4, 64\]"),
        ({"x": torch.ones(3, 64).half()}, TypeError, "x must be .* like x"),
        ({"factors": [torch.ones(2, 4, 64), torch.ones(2, 8, 4)]}, ValueError, r"factors must be \[a, b, s\] or"),
        ({"factors": [], "seed": SEED}, ValueError, "seed is of no use without factors"),
        ({"s": torch.ones(4, 4)}, ValueError, r"s must be \[3, 4\], found \[4, 4\]"),
        ({"s": torch.ones(3, 4).half()}, TypeError, "s must be .* for x of"),
    ],
)
def test_gradients_of_arguments_that_do_not_fit(call, change, error, message):
    given = arguments()
    del given["bias"]
    given |= {"grad": torch.ones(3, 8), "needs": [True] * 3}
    given["factors"] = [*given["factors"], change.get("s", torch.ones(3, 4))]
    with pytest.raises(error, match=message):
        call(**{**given, **{name: value for name, value in change.items() if name != "s"}})


@pytest.mark.parametrize("quantized", [False, True])
def test_opcheck(quantized):
    dtype = torch.bfloat16
    x, offsets, a, b = values(7, 64, dtype=dtype), ends((3, 2)), values(2, 4, 64).float(), values(2, 8, 4).float()
    stored = values(2, 8, 64, dtype=dtype)
    w = ops.quantize_4bit(stored.float()).operands() if quantized else ([stored], [])
    bias = values(2, 8, dtype=dtype)
    torch.library.opcheck(OPS.grouped_linear, (x, offsets, *w, bias, [a, b], False, 0.5, 0.2, SEED))
    torch.library.opcheck(OPS.grouped_linear, (x, offsets, *w, None, []))
    grad, s = values(7, 8, dtype=dtype), torch.randn(7, 4)
    given = grad, x, offsets, *w, [a, b, s], False, [True, True, False], 0.5, 0.2, SEED
    torch.library.opcheck(OPS.grouped_linear_backward, given)
    torch.library.opcheck(OPS.grouped_linear_backward, (grad, None, offsets, *w, [], False, [True, False, False]))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch's own tracing does
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_compiles_without_a_graph_break_under_checkpointing(p):
    w, x, offsets = values(3, 8, 64).float(), values(6, 64).float(), ends((2, 0, 3))
    a, b = (values(*shape).float().requires_grad_() for shape in ((3, 4, 64), (3, 8, 4)))

    def loss(x, a, b, offsets):
        def layer(x):
            return ops.grouped_lora_linear(x * 2, offsets, w, None, a, b, False, 0.5, p).square().sum()

        return checkpoint(layer, x, use_reentrant=False)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for call in (loss, compiled):
        torch.manual_seed(1)
        results.append(torch.autograd.grad(call(x, a, b, offsets), (a, b)))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)


def test_only_what_asks_for_it_gets_a_gradient():
    x, w, offsets = values(5, 64).float(), values(2, 8, 64).float(), ends((2, 3))
    a, b, bias = values(2, 4, 64).float(), values(2, 8, 4).float(), values(2, 8).float()
    assert not ops.grouped_lora_linear(x, offsets, w, bias, a, b).requires_grad
    for i in range(4):
        inputs = [t.clone() for t in (x, bias, a, b)]
        inputs[i].requires_grad_()
        ops.grouped_lora_linear(inputs[0], offsets, w, *inputs[1:]).sum().backward()
        assert [t.grad is not None for t in inputs] == [i == j for j in range(4)]
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        y = ops.grouped_linear(x.requires_grad_(), offsets, w).square().sum()
        torch.autograd.grad(y, x, create_graph=True)


def test_autocast_computes_in_its_dtype():
    x, w, offsets = values(5, 64).float().requires_grad_(), values(2, 8, 64).float(), ends((2, 3))
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.grouped_linear(x, offsets, w)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), ops.grouped_linear(x, offsets, w), rtol=0.02, atol=0.3)
    found.sum().backward()
    assert x.grad.dtype == torch.float32
