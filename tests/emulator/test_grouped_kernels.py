"""The CUDA kernels of experts on the emulator against float64, over shapes that are no multiples of anything."""

from ctypes import byref, c_bool
from dataclasses import dataclass

import pytest
import torch
from emulator.formats import KINDS, packed
from emulator.products import SEED, check, dropout, guarded, kept, normal, untouched
from emulator.structs import DTYPES, GroupedDown, GroupedReduce, GroupedSkinny, GroupedUp, Groups, WeightView, address

from peftcore import ops
from peftcore.ops.dropout import keep_mask

# Rows of each expert, and of none. By their number the kernels take 8, 16 or 64 rows at a time.
COUNTS = {
    "few": ((3, 0, 17, 1), 2),
    "one_row": ((0, 0, 1, 0), 0),
    "none": ((0, 0), 3),
    "many_experts": ((0,) * 63 + (2, 0, 1) + (0,) * 70 + (3,), 1),
    "all_in_one": ((0, 70, 0), 0),
    "one_expert": ((30,), 5),
    "medium": ((40, 0, 75), 0),
    "large": ((150, 129), 1),
}


def offsets_of(counts):
    return torch.tensor(counts).cumsum(0).to(torch.int32)


@dataclass
class Case:
    """A product of all rows: `counts` of each expert and `behind`; x [rows, inner], out [rows, columns]."""

    counts: tuple
    behind: int
    dtype: torch.dtype
    inner: int = 128
    columns: int = 75
    rank: int = 0
    packed: str = ""  # without it, what the library has computed is there
    p: float = 0.0
    bias: bool = False

    def __post_init__(self):
        self.offsets, self.experts = offsets_of(self.counts), len(self.counts)
        self.rows = sum(self.counts) + self.behind
        self.x = normal(self.rows, self.inner, dtype=self.dtype)
        self.base = normal(self.rows, self.columns, seed=5, dtype=self.dtype)
        self.thin = normal(self.rows, self.rank, seed=2)
        self.factor = normal(self.experts, self.columns, self.rank, seed=3)
        self.added = normal(self.experts, self.columns, seed=4, dtype=self.dtype) if self.bias else None
        if not self.packed:
            return
        shape = self.experts, self.columns, self.inner
        nested = self.packed == "nested"  # an expert is not a whole number of blocks of scales
        if self.packed in KINDS:
            self.weight = packed(self.packed, *shape, seed=1)
        else:
            values = normal(*shape, seed=1)
            self.weight = ops.quantize_4bit(values, blocksize=64, double_quant=nested, nested_blocksize=128)
        self.matrices = ops.dequantize_4bit(self.weight, self.dtype).double()

    def wanted(self):
        """In float64: the product, and the sum of its terms' magnitudes."""
        keep = keep_mask(self.rows, self.columns, self.p, SEED).double()
        y, size = torch.zeros(2, self.rows, self.columns, dtype=torch.float64)
        for e, own in enumerate(slices_of(self.offsets)):
            factor, x, thin = (t.double() for t in (self.factor[e].T, self.x[own], self.thin[own]))
            bias = torch.zeros(()) if self.added is None else self.added[e].double()
            base, base_size = (self.base[own].double(),) * 2
            if self.packed:
                base, base_size = x @ self.matrices[e].T, x.abs() @ self.matrices[e].abs().T
            y[own] = base + thin @ factor * keep[own] + bias
            size[own] = base_size.abs() + thin.abs() @ factor.abs() + bias.abs()
        return y, size


def slices_of(offsets):
    """Each expert's rows."""
    ends = offsets.tolist()
    return [slice(*pair) for pair in zip([0, *ends], ends, strict=False)]


class Kernels:
    """The launchers with tensors: allocates what they write."""

    def __init__(self, library, emulated):
        self.library, self.emulated = library, emulated

    def run(self, name, launch, out, memory, seed):
        self.emulated(f"peftcore_grouped_{name}")(launch, seed=seed)
        untouched(memory)
        return out

    def launch(self, case, out):
        launch = GroupedSkinny(Groups(case.offsets, case.rows), DTYPES.index(case.dtype), address(case.x))
        launch.out, launch.inner, launch.columns = address(out), case.inner, case.columns
        launch.weight, launch.bias = WeightView(case.weight), address(case.added)
        launch.thin, launch.factor, launch.rank = address(case.thin), address(case.factor), case.rank
        return launch

    def skinny(self, case, seed=0):
        assert self.is_skinny(case)
        memory, out = guarded(case.rows, case.columns, dtype=case.dtype)
        return self.run("skinny", self.launch(case, out), out, memory, seed)

    def is_skinny(self, case):
        function = self.library.peftcore_grouped_is_skinny
        function.restype = c_bool
        return function(byref(self.launch(case, case.x)))

    def up(self, case, seed=0):
        memory, out = guarded(case.rows, case.columns, dtype=case.dtype)
        out.copy_(case.base)
        launch = GroupedUp(Groups(case.offsets, case.rows), DTYPES.index(case.dtype), case.columns)
        launch.bias, launch.thin, launch.factor = (address(t) for t in (case.added, case.thin, case.factor))
        launch.rank, launch.dropout, launch.out = case.rank, dropout(case.p), address(out)
        return self.run("up", launch, out, memory, seed)

    def down(self, x, offsets, factor, across, scale=1.0, p=0.0, seed=0):
        rank = factor.shape[2 if across else 1]
        memory, out = guarded(len(x), rank, dtype=torch.float32)
        launch = GroupedDown(Groups(offsets, len(x)), DTYPES.index(x.dtype), address(x), x.shape[1])
        launch.factor, launch.across, launch.rank = address(factor), across, rank
        launch.scale, launch.dropout, launch.out = scale, dropout(p), address(out)
        return self.run("down", launch, out, memory, seed)

    def reduce(self, x, thin, offsets, dtype, transposed, p=0.0, seed=0):
        columns, rank = x.shape[1], thin.shape[1]
        sizes = (rank, columns) if transposed else (columns, rank)
        memory, out = guarded(len(offsets), *sizes, dtype=dtype)
        launch = GroupedReduce(Groups(offsets, len(x)), DTYPES.index(x.dtype), address(x), address(thin))
        launch.columns, launch.rank, launch.dropout = columns, rank, dropout(p)
        launch.out_dtype, launch.transposed, launch.out = DTYPES.index(dtype), transposed, address(out)
        return self.run("reduce", launch, out, memory, seed)


@pytest.fixture(scope="module")
def kernels(emulated_library, emulated):
    return Kernels(emulated_library, emulated)


@pytest.mark.parametrize("rank", [0, 1, 16, 40, 70])
@pytest.mark.parametrize("counts", COUNTS)
def test_up(kernels, counts, rank):
    """Neighbours differ in all the rest."""
    number = list(COUNTS).index(counts) + rank
    dtype, columns, p = DTYPES[number % 3], [75, 66, 72][number // 2 % 3], [0.0, 0.3][number % 2]
    case = Case(*COUNTS[counts], dtype, columns=columns, rank=rank, p=p, bias=number % 4 < 2)
    found = kernels.up(case, seed=number)
    check(found, *case.wanted())
    assert (found[sum(case.counts) :] == 0).all()


@pytest.mark.parametrize("rank", [0, 3, 40])
@pytest.mark.parametrize("packed", ["plain", "nested"])
@pytest.mark.parametrize("counts", ["few", "one_row", "none", "many_experts"])
def test_skinny_products_from_four_bits(kernels, counts, packed, rank):
    number = list(COUNTS).index(counts) + rank
    dtype, inner = DTYPES[1 + number % 2], [64, 320][number // 2 % 2]
    case = Case(*COUNTS[counts], dtype, inner, 75, rank, packed, bias=number % 2 == 0)
    check(kernels.skinny(case, seed=number), *case.wanted())


def test_what_is_left_to_the_library(kernels):
    """fp32, rows of W that are no whole blocks of 64 columns, and many rows."""
    few = {"counts": (3, 0, 17), "behind": 2, "dtype": torch.half, "packed": "plain"}
    assert kernels.is_skinny(Case(**few))
    for other in ({"dtype": torch.float32}, {"inner": 96, "columns": 64}, {"counts": (40, 0, 17)}):
        assert not kernels.is_skinny(Case(**few | other))


@pytest.mark.parametrize("rank", [1, 16, 33, 100])
@pytest.mark.parametrize("counts", COUNTS)
def test_down(kernels, counts, rank):
    offsets = offsets_of(COUNTS[counts][0])
    groups, rows = slices_of(offsets), int(offsets[-1]) + COUNTS[counts][1]
    number = list(COUNTS).index(counts) + rank
    p, across, columns = [0.0, 0.3][number % 2], number % 4 < 2, [75, 72, 136][number % 3]
    x = normal(rows, columns, dtype=DTYPES[number % 3])
    factor = normal(len(offsets), *((columns, rank) if across else (rank, columns)), seed=1)
    found = kernels.down(x, offsets, factor, across, 1.25, p, seed=number)
    wide, right = kept(x, p), (factor if across else factor.mT).double()
    for expert, own in enumerate(groups):
        check(found[own], 1.25 * wide[own] @ right[expert], 1.25 * wide[own].abs() @ right[expert].abs())
    assert (found[groups[-1].stop :] == 0).all()


@pytest.mark.parametrize("rank", [1, 16, 33, 100])
@pytest.mark.parametrize("counts", COUNTS)
def test_reduce(kernels, counts, rank):
    offsets = offsets_of(COUNTS[counts][0])
    groups, rows = slices_of(offsets), int(offsets[-1]) + COUNTS[counts][1]
    number = list(COUNTS).index(counts) + rank
    p, transposed, columns = [0.0, 0.3][number % 2], number % 4 < 2, [75, 72, 136][number % 3]
    x, thin = normal(rows, columns, dtype=DTYPES[number % 3]), normal(rows, rank, seed=1)
    dtype = [x.dtype, torch.float32][number // 2 % 2]
    found = kernels.reduce(x, thin, offsets, dtype, transposed, p, seed=number)
    wide = kept(x, p)
    for expert, own in enumerate(groups):
        ours = found[expert].T if transposed else found[expert]
        check(ours, wide[own].T @ thin[own].double(), wide[own].T.abs() @ thin[own].double().abs())


@pytest.mark.parametrize(
    "ends", [(3, 2, 9), (-1, 5, 9), (4, 9, 10), (2**31 - 1, -(2**31), 9), (0, 0, 2**31 - 1), (5, 9, -3)]
)
def test_offsets_that_do_not_rise_are_nan_and_lead_nowhere(kernels, ends):
    case = Case((3, 2, 4), 0, torch.half, columns=64, rank=3, packed="nested")
    case.offsets = torch.tensor(ends, dtype=torch.int32)
    assert kernels.skinny(case).isnan().all()
    assert kernels.up(case).isnan().all()
    assert kernels.down(case.x, case.offsets, normal(3, 5, 128), False).isnan().all()
    assert kernels.reduce(case.x, case.thin, case.offsets, torch.half, False).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("seed")
def test_dropout_has_the_bits_of_the_mask_of_all_rows(kernels, dtype):
    p, counts = 0.3, (5, 0, 28)
    mask, offsets = keep_mask(33, 72, p, SEED), offsets_of(counts)
    ones, eyes = torch.ones(33, 72, dtype=dtype), torch.eye(72).expand(3, 72, 72).contiguous()
    assert torch.equal(kernels.down(ones, offsets, eyes, False, p=p) == 1, mask)
    rows = kernels.reduce(ones, torch.eye(33), offsets, dtype, True, p)
    assert torch.equal(rows.sum(0) == 1, mask)
    case = Case(counts, 0, dtype, columns=72, rank=1, p=p)
    case.base.zero_()
    case.thin, case.factor = torch.ones(33, 1), torch.ones(3, 72, 1)
    assert torch.equal(kernels.up(case) == 1, mask)
    case.thin.fill_(torch.nan)  # what is dropped is zero all the same
    assert torch.equal(kernels.up(case).isnan(), mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_others_do_not_matter(kernels, dtype):
    """NaN in rows and factors of other experts stays there."""
    case = Case((5, 20, 3), 2, dtype, rank=3)
    wanted = case.wanted()
    for t in (case.base[:5], case.base[25:], case.thin[:5], case.thin[25:], case.factor[::2]):
        t.fill_(torch.nan)
    found = kernels.up(case)
    assert found[:5].isnan().all() and found[25:28].isnan().all() and (found[28:] == 0).all()
    check(found[5:25], *(t[5:25] for t in wanted))


def test_products_that_fp16_does_not_hold(kernels):
    for size in (1e-9, 1e5):
        case = Case((20, 30), 0, torch.half, rank=8)
        case.thin, case.factor = case.thin * size, case.factor / size
        check(kernels.up(case), *case.wanted())


def test_memory_off_its_alignment(kernels):
    def moved(t):
        return torch.zeros(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)

    case = Case((5, 40), 0, torch.bfloat16, columns=32, rank=8)
    case.thin, case.factor = moved(case.thin), moved(case.factor)
    check(kernels.up(case), *case.wanted())
    case = Case((5, 4), 0, torch.bfloat16, packed="nested")
    assert kernels.is_skinny(case)
    case.x = moved(case.x)
    assert not kernels.is_skinny(case)


def test_every_order_of_threads_gives_the_same_bits(kernels):
    few = Case((3, 0, 17), 1, torch.bfloat16, columns=128, rank=20, packed="nested")
    many = Case((140, 0), 1, torch.half, rank=20, columns=96, p=0.1)
    factor, thin = normal(3, 20, 128, seed=5), normal(21, 12, seed=6)

    def run(seed):
        return [
            kernels.skinny(few, seed),
            kernels.up(many, seed),
            kernels.down(few.x, few.offsets, factor, False, p=0.1, seed=seed),
            kernels.reduce(few.x, thin, few.offsets, torch.float32, False, 0.1, seed=seed),
        ]

    first = run(0)
    for seed in range(1, 5):
        assert all(map(torch.equal, first, run(seed)))


def test_nothing_to_do(kernels):
    for dtype in DTYPES:
        assert kernels.up(Case((0, 0), 0, dtype)).shape == (0, 75)
        assert kernels.up(Case((2, 0), 0, dtype, columns=0)).shape == (2, 0)
    assert kernels.skinny(Case((0, 0), 0, torch.half, packed="plain")).shape == (0, 75)
    nothing = torch.empty(0, 16).half()
    assert (kernels.reduce(nothing, torch.empty(0, 4), offsets_of((0, 0)), torch.half, True) == 0).all()
    assert kernels.down(nothing, offsets_of((0, 0)), torch.ones(2, 4, 16), False).shape == (0, 4)


@pytest.mark.nightly
def test_stays_within_its_memory(sanitized):
    done = sanitized("grouped", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cases agree" in done.stdout
