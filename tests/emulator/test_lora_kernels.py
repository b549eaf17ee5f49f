"""LoRA's CUDA kernels on the emulator against float64 and keep_mask, over shapes that are no multiples of anything."""

from ctypes import c_bool, c_float, c_int64

import pytest
import torch
from emulator.products import SEED, check, dropout, guarded, kept, normal, untouched
from emulator.structs import DTYPES, FactorCopy, Factors, WeightView, Wide

from peftcore import ops
from peftcore.ops.dropout import keep_mask

RANKS = [1, 3, 8, 16, 64, 100, 256]
ROWS = [1, 5, 16, 33, 64, 130]
SHAPES = [(rank, rows) for rank in RANKS for rows in ROWS]


def mixed(rank, rows, columns):
    """(dtype, dtype of a gradient, dropout's p, columns) of a case, so that neighbours differ."""
    dtype = DTYPES[1 + (rank + rows) % 2]
    return dtype, [dtype, torch.float32][(rank // 2 + rows) % 2], [0.0, 0.1, 0.5][(rank + rows // 2) % 3], columns


def check_product(found, left, right, scale=1.0, added=0.0):
    """found = scale left right + added; left and right in float64."""
    added = torch.as_tensor(added).double()
    check(found, scale * (left @ right) + added, abs(scale) * (left.abs() @ right.abs()) + added.abs())


class Kernels:
    """The launchers with tensors: allocates what they write."""

    def __init__(self, library, emulated):
        self.library, self.emulated = library, emulated

    def down(self, x, factors, scales, index=None, p=0.0, seed=0):
        samples, rows, columns = x.shape
        stride = max(t.shape[0] for t in factors)
        memory, s = guarded(samples * rows, stride, dtype=torch.float32)
        partial = self.emulated.workspace("peftcore_lora_down_workspace", c_int64(rows), c_int64(columns), stride)
        given = Factors(factors, 0, stride, scales, index)
        self.emulated("peftcore_lora_down")(Wide(x), given, dropout(p), partial, s, seed=seed)
        untouched(memory)
        return s

    def up(self, thin, factors, out, index=None, p=0.0, add=True, bias=None, seed=0):
        memory, found = guarded(*out.shape, dtype=out.dtype)
        found.copy_(out)
        given = Factors(factors, 1, thin.shape[1], index=index)
        launch = self.emulated("peftcore_lora_up")
        launch(thin, given, dropout(p), bias, c_bool(add), Wide(found), seed=seed)
        untouched(memory)
        return found

    def reduce(self, wide, thin, dtype, p=0.0, transposed=False, seed=0):
        (rows, columns), rank = wide.shape, thin.shape[1]
        memory, out = guarded(*((rank, columns) if transposed else (columns, rank)), dtype=dtype)
        partial = self.emulated.workspace("peftcore_lora_reduce_workspace", c_int64(rows), c_int64(columns), rank)
        arguments = Wide(wide), thin, rank, dropout(p), partial, out, DTYPES.index(dtype), c_bool(transposed)
        self.emulated("peftcore_lora_reduce")(*arguments, seed=seed)
        untouched(memory)
        return out

    def reduce_and_product(self, wide, thin, factor, scale, dtype, seed=0):
        (rows, columns), rank = wide.shape, thin.shape[1]
        memory, out = guarded(columns, rank, dtype=dtype)
        beside, product = guarded(rows, rank, dtype=torch.float32)
        sizes = c_int64(rows), c_int64(columns), rank
        partials = [
            self.emulated.workspace(f"peftcore_lora_{name}_workspace", *sizes) for name in ("reduce", "product")
        ]
        launch = self.emulated("peftcore_lora_reduce_and_product")
        arguments = Wide(wide), thin, factor, rank, c_float(scale), *partials
        launch(*arguments, out, DTYPES.index(dtype), product, seed=seed)
        untouched(memory)
        untouched(beside)
        return out, product

    def drop(self, x, p):
        out = torch.full_like(x, 7)
        self.emulated("peftcore_lora_drop")(Wide(x), dropout(p), out)
        return out

    def linear(self, x, weight, bias, thin, factor, seed=0):
        memory, y = guarded(x.shape[0], weight.shape[0], dtype=x.dtype)
        given = x, DTYPES.index(x.dtype), x.shape[0], WeightView(weight)
        launch = self.emulated("peftcore_quant4_linear")
        partial = self.emulated.workspace("peftcore_quant4_linear_workspace", *given[2:])
        launch(*given, bias, thin, factor, thin.shape[1], partial, y, seed=seed)
        untouched(memory)
        return y


@pytest.fixture(scope="module")
def kernels(emulated_library, emulated):
    return Kernels(emulated_library, emulated)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shapes", "transposed"), [([(3, 70), (33, 3)], (True, False)), ([(64, 40)], (True,))])
def test_factors_in_fp32(emulated, shapes, transposed, dtype):
    factors = [normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    wanted = [(t.T if turned else t).float().contiguous() for t, turned in zip(factors, transposed, strict=True)]
    places = [guarded(*t.shape, dtype=torch.float32) for t in wanted]
    copies = [FactorCopy(t, turned, to) for t, turned, (_, to) in zip(factors, transposed, places, strict=True)]
    emulated("peftcore_lora_copy_factors")((FactorCopy * len(copies))(*copies), len(copies))
    for t, (memory, found) in zip(wanted, places, strict=True):
        assert torch.equal(found, t)
        untouched(memory)


def test_factors_of_many_adapters_take_two_launches(emulated):
    factors = [normal(1 + i % 40, 50 + i % 3, seed=i, dtype=DTYPES[i % 3]) for i in range(128)]
    places = [guarded(*t.shape, dtype=torch.float32) for t in factors]
    copies = [FactorCopy(t, False, to) for t, (_, to) in zip(factors, places, strict=True)]
    before = emulated.launches()
    emulated("peftcore_lora_copy_factors")((FactorCopy * 128)(*copies), 128)
    assert emulated.launches() - before == 2
    for t, (memory, found) in zip(factors, places, strict=True):
        assert torch.equal(found, t.float())
        untouched(memory)


@pytest.mark.parametrize(("rank", "rows"), [*SHAPES, (16, 300), (70, 270)])
def test_down(kernels, rank, rows):
    dtype, _, p, columns = mixed(rank, rows, [75, 72, 136][(rank + rows) % 3])
    x, a = normal(rows, columns, dtype=dtype), normal(rank, columns, seed=1)
    found = kernels.down(x[None], [a], [1.25], p=p, seed=rank)
    check_product(found, kept(x, p), a.double().T, 1.25)


@pytest.mark.parametrize(("rank", "columns"), [(3, 1100), (16, 2048), (100, 1028)])
def test_down_with_columns_split_over_blocks(kernels, rank, columns):
    x, a = normal(9, columns, dtype=torch.bfloat16), normal(rank, columns, seed=1)
    assert (
        len(kernels.emulated.workspace("peftcore_lora_down_workspace", c_int64(9), c_int64(columns), rank)) > 9 * rank
    )
    check_product(kernels.down(x[None], [a], [0.5], p=0.1), kept(x, 0.1), a.double().T, 0.5)


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("columns", [1100, 2048])
def test_down_of_few_rows_leaves_no_sums(kernels, rows, columns):
    assert len(kernels.emulated.workspace("peftcore_lora_down_workspace", c_int64(rows), c_int64(columns), 16)) == 0
    x, a = normal(3, rows, columns, dtype=torch.half), [normal(5, columns, seed=1), normal(3, columns, seed=2)]
    found = kernels.down(x, a, [0.5, -2.0], torch.tensor([1, -1, 0]), p=0.25, seed=rows)
    keep = kept(x.view(3 * rows, columns), 0.25).view(x.shape)
    check_product(found[:rows, :3], keep[0], a[1].double().T, -2.0)
    check_product(found[2 * rows :], keep[2], a[0].double().T, 0.5)
    assert (found[rows : 2 * rows] == 7).all() and (found[:rows, 3:] == 7).all()  # of no adapter, beyond its rank


@pytest.mark.parametrize(("rank", "rows"), SHAPES)
def test_up(kernels, rank, rows):
    dtype, _, p, columns = mixed(rank, rows, [75, 72, 136][(rank + rows) % 3])
    thin, factor = normal(rows, rank), normal(columns, rank, seed=1)
    before = normal(1, rows, columns, seed=2, dtype=dtype)
    add = p == 0
    found = kernels.up(thin, [factor], before, p=p, add=add, seed=rank)[0]
    mask = keep_mask(rows, columns, p, SEED)
    assert (found[~mask] == 0).all()
    wanted, magnitude = thin.double() @ factor.double().T, thin.double().abs() @ factor.double().abs().T
    if add:
        wanted, magnitude = wanted + before[0].double(), magnitude + before[0].double().abs()
    check(found, wanted * mask, magnitude)
    bias = normal(columns, seed=3, dtype=dtype)
    check_product(
        kernels.up(thin, [factor], before, add=False, bias=bias)[0], thin.double(), factor.double().T, 1, bias
    )


@pytest.mark.parametrize(("rank", "rows"), [*SHAPES, (16, 600)])
def test_reduce(kernels, rank, rows):
    dtype, out_dtype, p, columns = mixed(rank, rows, [75, 72, 136][(rank + rows) % 3])
    wide, thin = normal(rows, columns, dtype=dtype), normal(rows, rank, seed=1)
    transposed = rows % 2 == 0
    found = kernels.reduce(wide, thin, out_dtype, p, transposed, seed=rank)
    check_product(found.T if transposed else found, kept(wide, p).T, thin.double())


@pytest.mark.parametrize(("rank", "rows"), [*((rank, rows) for rank, rows in SHAPES if rank <= 16), (16, 600)])
def test_reduce_and_product(kernels, rank, rows):
    dtype, out_dtype, _, columns = mixed(rank, rows, [75, 72, 392][(rank + rows) % 3])
    wide, thin = normal(rows, columns, dtype=dtype), normal(rows, rank, seed=1)
    factor = normal(rank, columns, seed=2)
    out, product = kernels.reduce_and_product(wide, thin, factor, 0.75, out_dtype, seed=rank)
    check_product(out, wide.double().T, thin.double())
    check_product(product, wide.double(), factor.double().T, 0.75)


@pytest.mark.parametrize("size", [1e-9, 1e5])
def test_products_that_fp16_does_not_hold(kernels, size):
    """T of small gradients under fp16's smallest number, S over its largest, and back: nothing is lost."""
    wide, thin, factor = normal(40, 72, dtype=torch.half), normal(40, 8, seed=1) * size, normal(8, 72, seed=2) * size
    s = kernels.down(wide[None], [factor], [1.0])
    da = kernels.reduce(wide, thin, torch.float32)
    out, product = kernels.reduce_and_product(wide, thin, factor, 1.0, torch.float32)
    back = kernels.up(thin, [factor.T.contiguous() / size**2], wide[None], add=False)[0]
    for found, exact, eps in (
        (s, wide.double() @ factor.double().T, 1e-6),
        (product, wide.double() @ factor.double().T, 1e-6),
        (da, wide.double().T @ thin.double(), 1e-6),
        (out, wide.double().T @ thin.double(), 1e-6),
        (back, thin.double() @ factor.double() / size**2, 2.0**-11),
    ):
        assert (found.double() - exact).norm() <= eps * exact.norm()


@pytest.mark.parametrize("bits", [0x7F800000, -0x800000, 0x7F800001, 0x7FC00000, -1])
def test_infinity_and_every_nan_stay_what_they_are(kernels, bits):
    """Also a NaN whose upper bits, which a product reads, are those of infinity."""
    factor = torch.ones(8, 64)
    factor.view(torch.int32)[3, 5] = bits
    found = kernels.down(torch.ones(20, 64, dtype=torch.half)[None], [factor], [1.0])
    wanted = torch.full((20, 8), 64.0)
    wanted[:, 3] = factor[3].sum()
    assert torch.equal(found.nan_to_num(7, posinf=8, neginf=9), wanted.nan_to_num(7, posinf=8, neginf=9))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("rows", [1, 5, 16, 33, 64])
def test_linear_with_lora_from_four_bits(kernels, rank, rows, nested):
    dtype, _, _, columns = mixed(rank, rows, [64, 128, 320][(rank + rows) % 3])
    weight = ops.quantize_4bit(normal(37, columns), double_quant=nested, nested_blocksize=32)
    dense = ops.dequantize_4bit(weight, dtype).double()
    x, bias = normal(rows, columns, seed=1, dtype=dtype), normal(37, seed=2, dtype=dtype)
    thin, factor = normal(rows, rank, seed=3), normal(37, rank, seed=4)
    found = kernels.linear(x, weight, bias, thin, factor, seed=rank)
    left = torch.cat([x.double(), thin.double()], 1)
    check_product(found, left, torch.cat([dense, factor.double()], 1).T, added=bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [40, 43])
@pytest.mark.usefixtures("seed")
def test_dropout_has_the_bits_of_the_mask(kernels, dtype, columns):
    p, ones = 0.3, torch.ones(33, columns, dtype=dtype)
    mask = keep_mask(33, columns, p, SEED)
    assert torch.equal(kernels.drop(ones, p) == 1, mask)
    if dtype == torch.float32:
        return
    assert torch.equal(kernels.down(ones[None], [torch.eye(columns)], [1.0], p=p) == 1, mask)
    out = torch.zeros(1, 33, columns, dtype=dtype)
    found = kernels.up(torch.ones(33, 1), [torch.ones(columns, 1)], out, p=p, add=False)
    assert torch.equal(found[0] == 1, mask)
    assert torch.equal(kernels.reduce(ones, torch.eye(33), dtype, p).T == 1, mask)


@pytest.mark.parametrize("seed", ["read by the kernel"], indirect=True)
def test_a_launch_that_is_repeated_reads_the_seed_that_is_there_now(kernels, seed):
    """As a CUDA graph repeats it, with the arguments of its capture."""
    p, ones = 0.3, torch.ones(33, 40, dtype=torch.half)
    calls = (
        lambda: kernels.drop(ones, p),
        lambda: kernels.down(ones[None], [torch.eye(40)], [1.0], p=p),
        lambda: kernels.down(ones[None, :1], [torch.eye(40)], [1.0], p=p),  # of few rows
        lambda: kernels.up(torch.ones(33, 1), [torch.ones(40, 1)], ones[None], p=p, add=False)[0],
        lambda: kernels.reduce(ones, torch.eye(33), torch.half, p).T,
    )
    for value in (5, -(2**62) - 1):
        seed.fill_(value)
        mask = keep_mask(33, 40, p, seed)
        assert torch.equal(mask, keep_mask(33, 40, p, value))
        for call in calls:
            found = call()
            assert torch.equal(found == 1, mask[: len(found)])


def test_dropout_at_its_threshold(kernels):
    """So many elements that some draw the threshold itself."""
    rows, columns, p = 500, 800, 0.5
    mask = keep_mask(rows, columns, p, SEED)
    ones = torch.ones(rows, columns, dtype=torch.half)
    assert torch.equal(kernels.drop(ones, p) == 1, mask)
    found = kernels.up(torch.ones(rows, 1), [torch.ones(columns, 1)], ones[None], p=p, add=False)
    assert torch.equal(found[0] == 1, mask)


def test_what_is_dropped_is_zero_even_if_it_is_not_a_number(kernels):
    x, p = torch.full((5, 40), torch.nan, dtype=torch.half), 0.5
    mask = keep_mask(5, 40, p, SEED)
    found = kernels.down(x[None], [torch.eye(40)], [1.0], p=p)
    assert torch.equal(found.isnan(), mask.any(1, keepdim=True).expand(5, 40))
    assert torch.equal(kernels.drop(x, p).isnan(), mask)


@pytest.mark.parametrize(("adapters", "rows"), [(3, 1), (3, 20), (70, 1)])
def test_an_adapter_for_each_sample(kernels, adapters, rows):
    ranks = [[4, 100, 1][i % 3] for i in range(adapters)]
    a = [normal(r, 72, seed=i) for i, r in enumerate(ranks)]
    b = [normal(75, r, seed=i + 1) for i, r in enumerate(ranks)]
    scales = [1.0 + i / 8 for i in range(adapters)]
    index = torch.tensor([1, -1, adapters - 1, 0, adapters - 1, adapters, -2])
    x, y = normal(7, rows, 72, dtype=torch.bfloat16), normal(7, rows, 75, seed=9, dtype=torch.bfloat16)
    s = kernels.down(x, a, scales, index)
    found = kernels.up(s, b, y, index)
    assert torch.equal(found[1], y[1])
    assert found[5:].isnan().all()  # no such adapter
    for sample in (0, 2, 3, 4):
        i = int(index[sample])
        mine = s.view(7, rows, -1)[sample, :, : ranks[i]]
        check_product(mine, x[sample].double(), a[i].double().T, scales[i])
        check_product(found[sample], mine.double(), b[i].double().T, added=y[sample])


def test_memory_off_its_alignment(kernels):
    def moved(t):
        return torch.zeros(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)

    x, a = moved(normal(20, 64, dtype=torch.half)), moved(normal(8, 64))
    check_product(kernels.down(x[None], [a], [1.0]), x.double(), a.double().T)
    thin = moved(normal(20, 8))
    check_product(kernels.reduce(x, thin, torch.half), x.double().T, thin.double())
    check_product(kernels.up(thin, [a.T.contiguous()], x[None], add=False)[0], thin.double(), a.double())


def test_every_order_of_threads_gives_the_same_bits(kernels):
    x, a = normal(70, 1100, dtype=torch.bfloat16), normal(20, 1100, seed=1)
    wide, thin = normal(600, 130, dtype=torch.half), normal(600, 12, seed=1)
    factor, few = normal(12, 130, seed=2), normal(130, 12, seed=2)
    weight = ops.quantize_4bit(normal(20, 1088))
    s, b = normal(33, 20), normal(20, 20)

    def run(seed):
        return [
            kernels.down(x[None, :17], [a], [1.0], p=0.1, seed=seed),
            kernels.down(x[None, :5], [a], [1.0], p=0.1, seed=seed),
            kernels.reduce(wide, thin, torch.float32, 0.1, seed=seed),
            *kernels.reduce_and_product(wide, thin, factor, 1.0, torch.float32, seed=seed),
            kernels.up(thin[:70], [few], wide[None, :70], seed=seed),
            kernels.linear(x[:33, :1088].contiguous(), weight, None, s, b, seed=seed),
        ]

    first = run(0)
    for seed in range(1, 6):
        assert all(map(torch.equal, first, run(seed)))


def test_nothing_to_do_and_what_is_refused(kernels):
    a = torch.ones(4, 16)
    assert kernels.down(torch.empty(1, 0, 16).half(), [a], [1.0]).shape == (0, 4)
    assert (kernels.down(torch.empty(1, 3, 0).half(), [torch.empty(4, 0)], [1.0]) == 0).all()
    assert (kernels.reduce(torch.empty(0, 16).half(), torch.empty(0, 4), torch.float32) == 0).all()
    out, product = kernels.reduce_and_product(torch.empty(0, 16).half(), torch.empty(0, 4), a, 1.0, torch.half)
    assert (out == 0).all() and product.shape == (0, 4)
    assert kernels.up(torch.empty(0, 4), [a], torch.empty(1, 0, 4).half()).numel() == 0
    with pytest.raises(RuntimeError, match="x must have 16 bits"):
        kernels.down(torch.ones(1, 3, 16), [torch.ones(4, 16)], [1.0])
    with pytest.raises(RuntimeError, match="more ranks than one pass takes"):
        kernels.reduce_and_product(torch.ones(3, 16).half(), torch.ones(3, 17), a, 1.0, torch.half)


def test_more_blocks_than_a_launch_has_are_refused(emulated):
    # A block for each sample and rank: 2^32 + 64, of which 32 bits are 64.
    x, a, s, index = torch.ones(1, 8).half(), torch.ones(64, 8), torch.zeros(1, 64), torch.zeros(1, dtype=torch.int64)
    wide = Wide(x)
    wide.samples = 2**26 + 1
    with pytest.raises(RuntimeError, match=r"more than 2\^31 - 1 blocks. Divide the rows among several calls"):
        emulated("peftcore_lora_down")(wide, Factors([a], 0, 64, [1.0], index), dropout(0), None, s)
    assert not s.any()


@pytest.mark.nightly
def test_stays_within_its_memory(sanitized):
    done = sanitized("lora", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cases agree" in done.stdout
