"""linear_4bit's compiled kernels against float64: every SIMD level, dtype and way through, whatever the threads."""

import threading
from pathlib import Path

import pytest
import torch
from card.checks import EPS, SUMS
from hypothesis import given, settings, strategies as st

from peftcore import ops

if ops.extension is None:
    pytest.skip("needs the compiled extension", allow_module_level=True)

OPS = torch.ops.peftcore
LEVELS = ops.extension.cpu_levels()
CPU_INFO = Path("/proc/cpuinfo").read_text()
# A build without AMX leaves the product to the library on a CPU with it.
HAS_TILES = "avx512_bf16" in CPU_INFO and ("amx" in LEVELS or "amx_bf16" not in CPU_INFO)
TILE_LEVELS = [name for name in LEVELS if (HAS_TILES and name in ("avx512bf16", "amx")) or name == "neonbf16"]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BATCHES = [0, 1, 2, 3, 4, 5, 8, 9, 12, 16, 24, 25, 31, 32, 33, 70]  # around each limit of a kernel


@pytest.fixture(params=LEVELS)
def level(request):
    before = ops.extension.cpu_level()
    ops.extension.set_cpu_level(request.param)
    yield request.param
    ops.extension.set_cpu_level(before)


def weight(rows, columns, blocksize=64, nested=True, quant_type="nf4", seed=0):
    """(an operator's two arguments, the weight in float64)."""
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    packed = ops.quantize_4bit(w, quant_type, blocksize=blocksize, double_quant=nested, nested_blocksize=32)
    return packed.operands(), packed.values(torch.float64)


def values(shape, dtype, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(found, a, b, bias=None):
    """found = a b + bias, where a and b are float64; a weight or its codebook entry may be rounded to x's dtype."""
    exact, magnitude = a @ b, a.abs() @ b.abs()
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.abs().double()
    eps = EPS[found.dtype]
    bound = magnitude * (SUMS + eps) + exact.abs() * eps + torch.finfo(found.dtype).tiny
    assert ((found.double() - exact).abs() <= bound).all()


def check(rows, columns, batch, dtype, blocksize, nested, code="nf4", bias=True):
    quantized, dense = weight(rows, columns, blocksize, nested, code)
    x, grad = values((batch, columns), dtype), values((batch, rows), dtype, 2)
    b = values((rows,), dtype, 3) if bias else None
    assert_near(OPS.linear_4bit(x, *quantized, b), x.double(), dense.T, b)
    assert_near(OPS.linear_4bit_backward(grad, *quantized), grad.double(), dense)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("columns", "blocksize"), [(64, 64), (192, 32), (328, 64), (576, 128), (75, 32)])
def test_every_number_of_rows(level, batch, dtype, columns, blocksize):
    check(37, columns, batch, dtype, blocksize, nested=True)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 80),
    columns=st.sampled_from([1, 8, 64]).flatmap(lambda step: st.integers(1, 640 // step).map(lambda n: step * n)),
    batch=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    blocksize=st.sampled_from([32, 64, 128, 256, 512, 1024, 2048, 4096]),
    nested=st.booleans(),
    code=st.sampled_from(["nf4", "fp4"]),
    bias=st.booleans(),
    level=st.sampled_from(LEVELS),
)
def test_shapes_whose_blocks_cross_rows(rows, columns, batch, dtype, blocksize, nested, code, bias, level):
    before = ops.extension.cpu_level()
    ops.extension.set_cpu_level(level)
    try:
        check(rows, columns, batch, dtype, blocksize, nested, code, bias)
    finally:
        ops.extension.set_cpu_level(before)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(2100, 1088), (1025, 4099), (131072 * 2, 72)])
def test_more_than_one_panel(dtype, rows, columns):
    check(rows, columns, 33, dtype, 64, nested=True)


@pytest.mark.parametrize("level", TILE_LEVELS, indirect=True)
@pytest.mark.parametrize(
    ("rows", "columns", "batch"),
    [(37, 4160, 40), (4099, 64, 3), (5, 64, 1600), (130, 2112, 97), (1, 64, 33), (70, 1088, 40)],
    ids=["columns", "rows", "x", "all", "one row", "an odd number of blocks"],
)
def test_bf16_tiles_where_there_is_more_than_one_of_anything(level, rows, columns, batch):
    check(rows, columns, batch, torch.bfloat16, 64, nested=True, bias=batch != 97)


# Elsewhere the product is the library's, whose sums are its own business.
@pytest.mark.parametrize("level", TILE_LEVELS, indirect=True)
def test_bf16_tiles_give_the_same_bits_by_any_number_of_threads(level):
    rows, columns, batch = 70, 2112, 200  # few tiles, whose rows of x are divided
    quantized, _ = weight(rows, columns)
    x, grad = values((batch, columns), torch.bfloat16), values((batch, rows), torch.bfloat16, 2)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        y = OPS.linear_4bit(x, *quantized, None)
        results.append((y, OPS.linear_4bit_backward(grad, *quantized)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("level", TILE_LEVELS, indirect=True)
def test_nan_that_an_earlier_product_left_in_the_workspace_does_not_show(level):
    broken, _ = weight(160, 2112, nested=False)
    broken[0][1].fill_(torch.nan)
    rows, columns, batch = 70, 64, 40  # of all, less than whole tiles
    quantized, w = weight(rows, columns)
    x, grad = values((batch, columns), torch.bfloat16), values((batch, rows), torch.bfloat16, 2)
    spoiled = values((200, 2112), torch.bfloat16).fill_(torch.nan)
    assert OPS.linear_4bit(spoiled, *broken, None).isnan().all()
    assert_near(OPS.linear_4bit(x, *quantized, None), x.double(), w.T)
    OPS.linear_4bit_backward(spoiled[:, :160].contiguous(), *broken)
    assert_near(OPS.linear_4bit_backward(grad, *quantized), grad.double(), w)


def test_a_row_of_the_weight_that_is_nan_shows_in_its_column_only(level):
    w = torch.randn(20, 128, generator=torch.Generator().manual_seed(0))
    w[3, 70] = torch.nan
    quantized = ops.quantize_4bit(w).operands()
    y = OPS.linear_4bit(values((40, 128), torch.bfloat16), *quantized)
    assert y[:, 3].isnan().all() and y[:, :3].isfinite().all() and y[:, 4:].isfinite().all()
    dx = OPS.linear_4bit_backward(values((5, 20), torch.bfloat16), *quantized)
    assert dx[:, 64:].isnan().all() and dx[:, :64].isfinite().all()


@pytest.mark.skipif(LEVELS == ["portable"], reason="the library's product, whose sums are its own business")
@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("simd", LEVELS[1:])
def test_the_number_of_threads_changes_no_bit(simd, batch, dtype):
    rows, columns = 515, 1024
    quantized, _ = weight(rows, columns)
    x = values((batch, columns), dtype)
    before = torch.get_num_threads(), ops.extension.cpu_level()
    ops.extension.set_cpu_level(simd)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(OPS.linear_4bit(x, *quantized, None))
    torch.set_num_threads(before[0])
    ops.extension.set_cpu_level(before[1])
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("batch", [2, 5, 40])
def test_x_that_is_not_contiguous(level, batch):
    quantized, dense = weight(20, 128)
    for dtype in DTYPES:
        x, grad = values((128, batch), dtype).T, values((20, batch), dtype).T
        assert_near(OPS.linear_4bit(x, *quantized, None), x.double(), dense.T)
        assert_near(OPS.linear_4bit_backward(grad, *quantized), grad.double(), dense)
        expanded = values((1, 128), dtype).expand(batch, 128)
        assert_near(OPS.linear_4bit(expanded, *quantized, None), expanded.double(), dense.T)


def test_leading_dimensions_stay(level):
    quantized, dense = weight(20, 128)
    for shape in ((128,), (1, 128), (2, 3, 128), (2, 0, 128)):
        x = values(shape, torch.bfloat16)
        y = OPS.linear_4bit(x, *quantized, None)
        assert y.shape == (*shape[:-1], 20)
        assert_near(y.reshape(-1, 20), x.double().reshape(-1, 128), dense.T)


def test_infinite_and_nan_inputs_show_in_their_row_only(level):
    quantized, _ = weight(20, 128)
    for batch in (2, 4, 40):
        x = values((batch, 128), torch.bfloat16)
        x[1, 5] = torch.nan
        y = OPS.linear_4bit(x, *quantized, None)
        assert y[1].isnan().all() and y[0].isfinite().all() and y[2:].isfinite().all()


def test_threads_of_the_caller_do_not_share_a_workspace():
    quantized, dense = weight(300, 256)
    failed = []

    def work(seed):
        for batch in (1, 7, 50):
            x = values((batch, 256), torch.float32, seed)
            try:
                assert_near(OPS.linear_4bit(x, *quantized, None), x.double(), dense.T)
            except AssertionError as error:
                failed.append(error)
        ops.free_workspace()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


@pytest.mark.skipif("cuda" not in DEVICES, reason="no GPU")
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [64, 352, 75])
def test_on_a_gpu(batch, dtype, columns):
    (tensors, packing), dense = weight(37, columns)
    x, grad, bias = values((batch, columns), dtype), values((batch, 37), dtype, 2), values((37,), dtype, 3)
    there = [t.cuda() for t in tensors], packing
    assert_near(OPS.linear_4bit(x.cuda(), *there, bias.cuda()).cpu(), x.double(), dense.T, bias)
    assert_near(OPS.linear_4bit_backward(grad.cuda(), *there).cpu(), grad.double(), dense)
