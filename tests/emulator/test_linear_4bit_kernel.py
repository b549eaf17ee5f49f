"""linear_4bit's CUDA kernels on the emulator against float64."""

from ctypes import byref, c_bool, c_int64, c_void_p

import pytest
import torch
from emulator.products import check
from emulator.structs import DTYPES, WeightView, address
from hypothesis import given, settings, strategies as st
from support.whole_run import nightly_but

from peftcore import ops

HALVES = DTYPES[1:]


def case(rows, columns, batch, dtype, blocksize, nested, seed, code="nf4"):
    """(arguments of `run`, the result in float64, the sum of its terms' magnitudes)."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator)
    weight = ops.quantize_4bit(w, code, blocksize=blocksize, double_quant=nested, nested_blocksize=32)
    # Each value is rounded once to x's dtype, as the kernels do.
    dense = ops.dequantize_4bit(weight, dtype).double()
    x = torch.randn(batch, columns, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype)
    wanted = x.double() @ dense.T + bias.double()
    magnitude = x.double().abs() @ dense.abs().T + bias.double().abs()
    return (x, weight, bias), wanted, magnitude


def takes(emulated, x, weight):
    """Return whether the kernels take x and a `PackedWeight` or a `WeightView`, as the operator asks."""
    weight = weight if isinstance(weight, WeightView) else WeightView(weight)
    function = emulated.library.peftcore_quant4_linear_takes
    function.restype = c_bool
    return function(c_void_p(address(x)), DTYPES.index(x.dtype), c_int64(len(x)), byref(weight))


def run(emulated, x, weight, bias, seed=0, offset=0, tickets=True):
    """The launcher's result, `offset` values behind an allocation whose rest must stay as it is.

    weight: a `PackedWeight` or a `WeightView`.
    """
    assert takes(emulated, x, weight)
    weight = weight if isinstance(weight, WeightView) else WeightView(weight)
    batch, rows = x.shape[0], weight.rows
    count = batch * rows
    memory = torch.full((count + offset + 4,), 7, dtype=x.dtype)
    y = memory[offset : offset + count]
    given = (x, DTYPES.index(x.dtype), batch, weight)
    partial = emulated.workspace("peftcore_quant4_linear_workspace", batch, weight)
    emulated("peftcore_quant4_linear")(*given, bias, None, None, 0, partial, y, seed=seed, tickets=tickets)
    assert (memory[:offset] == 7).all() and (memory[offset + count :] == 7).all()
    return y.view(batch, rows)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 24).map(lambda n: 64 * n),
    batch=st.integers(1, 64),
    dtype=st.sampled_from(HALVES),
    blocksize=st.sampled_from([64, 256, 4096]),
    nested=st.booleans(),
    seed=st.integers(0, 10**6),
    code=st.sampled_from(["nf4", "fp4"]),
    offset=st.integers(0, 3),
    bias=st.booleans(),
)
def test_against_float64(emulated, rows, columns, batch, dtype, blocksize, nested, seed, code, offset, bias):
    arguments, wanted, magnitude = case(rows, columns, batch, dtype, blocksize, nested, seed, code)
    if not bias:
        wanted = wanted - arguments[-1].double()
        arguments = (*arguments[:-1], None)
    check(run(emulated, *arguments, seed=seed, offset=offset), wanted, magnitude)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("batch", [1, 8, 9, 16, 17, 24, 32, 33, 64])
@pytest.mark.parametrize("columns", [64, 576, 1024])
def test_every_way_through_the_launcher(emulated, dtype, batch, columns):
    arguments, wanted, magnitude = case(37, columns, batch, dtype, 64, True, columns + batch)
    check(run(emulated, *arguments), wanted, magnitude)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [17, 32, 50])
@pytest.mark.parametrize(
    "shape", nightly_but([(131, 64), (200, 512), (9, 1088), (150, 1600)], [(131, 64), (9, 1088)]), ids=str
)
def test_panels_of_w(emulated, dtype, batch, shape):
    """Rows of one and two panels, columns of one to four splits."""
    rows, columns = shape
    arguments, wanted, magnitude = case(rows, columns, batch, dtype, 64, True, columns + batch)
    check(run(emulated, *arguments, seed=batch), wanted, magnitude)


@pytest.mark.parametrize("shape", nightly_but([(1024, 64), (2048, 30), (4096, 9)], [(2048, 30)]), ids=str)
def test_clusters_of_two_four_and_eight_blocks_give_the_bits_of_another_launch(emulated, shape):
    columns, batch = shape
    arguments, wanted, magnitude = case(131, columns, batch, torch.bfloat16, 64, True, columns)
    first = run(emulated, *arguments, tickets=False)
    check(first, wanted, magnitude)
    for seed in range(3):
        assert torch.equal(run(emulated, *arguments, seed=seed), first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [3, 8, 20])
@pytest.mark.parametrize("nested", [True, False])
def test_a_column_of_w_has_the_bits_of_dequantization(emulated, dtype, batch, nested):
    (_, weight, _), _, _ = case(19, 1344, batch, dtype, 64, nested, batch, code="fp4" if nested else "nf4")
    dense = ops.dequantize_4bit(weight, dtype)
    for columns in torch.randperm(1344)[:48].split(batch):
        x = torch.nn.functional.one_hot(columns, 1344).to(dtype)
        assert torch.equal(run(emulated, x, weight, None), dense[:, columns].T)


@pytest.mark.parametrize("batch", [1, 5, 18])
def test_infinity_in_the_last_column_stays_there(emulated, batch):  # what is read behind a row's end counts for nothing
    (x, weight, bias), _, _ = case(9, 320, batch, torch.bfloat16, 64, True, 2)
    last = ops.dequantize_4bit(weight, torch.bfloat16)[:, -1]
    x[:, -1] = torch.inf
    wanted = (last * torch.inf).expand(batch, -1)  # NaN where a weight is 0
    assert torch.equal(run(emulated, x, weight, bias).nan_to_num(7), wanted.nan_to_num(7))


def test_what_is_left_to_the_library(emulated):
    """fp32, many rows, rows that are no whole blocks of 64 columns, and memory off its alignment."""

    def moved(t):
        return torch.zeros(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)

    (x, weight, _), *_ = case(20, 128, 5, torch.bfloat16, 64, True, 3)
    assert takes(emulated, x, weight)
    assert not takes(emulated, x.float(), weight)
    assert not takes(emulated, x.repeat(13, 1), weight)
    assert not takes(emulated, moved(x), weight)
    assert not takes(emulated, x, weight._replace(codes=moved(weight.codes)))
    for columns, blocksize in ((96, 64), (75, 64), (128, 32)):
        (x, weight, _), *_ = case(20, columns, 5, torch.half, blocksize, True, 3)
        assert not takes(emulated, x, weight)


@pytest.mark.parametrize("shape", nightly_but([(1024, 11), (64, 5), (1088, 33)], [(64, 5), (1024, 11)]), ids=str)
def test_every_order_of_threads_gives_the_same_bits(emulated, shape):
    columns, batch = shape
    arguments, _, _ = case(40, columns, batch, torch.bfloat16, 64, True, 1)
    first = run(emulated, *arguments, seed=0)
    for seed in range(1, 12):
        assert torch.equal(run(emulated, *arguments, seed=seed), first)


def test_nothing_to_do(emulated):
    arguments, _, _ = case(8, 64, 0, torch.half, 64, False, 1)
    assert run(emulated, *arguments).numel() == 0


@pytest.mark.nightly
def test_stays_within_its_memory(sanitized):
    done = sanitized("linear", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cases agree" in done.stdout
