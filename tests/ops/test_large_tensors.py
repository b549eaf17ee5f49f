"""More than 2^31 elements: what lies about the limits of 32-bit arithmetic equals what small tensors give."""

import resource

import pytest
import torch
from torch.nn import functional as F

from peftcore import ops

COLUMNS = 32768
ROWS = 2**31 // COLUMNS + 2  # of the weight that the packed values also are
COUNT = ROWS * COLUMNS + 33
BLOCK = 64
# Where element, byte and bit counts of bf16 or packed values pass 2^31 and 2^32, and both ends.
EDGES = [0, 2**28, 2**29, 2**30, 2**31, ROWS * COLUMNS]
WINDOW = 64 * BLOCK
PEAK_GB = 8.0


def available_gigabytes():
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 1e6


def windows():
    """Slices of whole blocks about each edge, the last one up to the end."""
    for edge in EDGES:
        yield slice(max(0, edge - WINDOW), min(edge + WINDOW, COUNT))


def refuse_small_machines():
    if ops.extension is None:
        pytest.skip("the reference takes several times the memory")
    try:
        found = available_gigabytes()
    except OSError:
        pytest.skip("needs /proc/meminfo to see whether the memory suffices")
    if found < PEAK_GB:
        pytest.skip(f"needs {PEAK_GB:.0f} GB of memory, {found:.1f} are available")


@pytest.mark.nightly
def test_more_than_2_to_the_31_elements():
    refuse_small_machines()
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(COUNT, dtype=torch.bfloat16)  # pages that nobody writes take no memory
    for part in windows():
        x[part] = torch.randn(part.stop - part.start, generator=generator).bfloat16()
    small = {part.start: ops.quantize_4bit(x[part], blocksize=BLOCK) for part in windows()}

    whole = ops.quantize_4bit(x, blocksize=BLOCK)
    packed, absmax = whole.codes, whole.absmax
    del x
    inside = 0
    for part in windows():
        codes, scales = small[part.start][:2]
        assert torch.equal(packed[part.start // 2 : (part.stop + 1) // 2], codes)
        assert torch.equal(absmax[part.start // BLOCK : -(-part.stop // BLOCK)], scales)
        inside += int((scales != 0).sum())
    assert absmax.count_nonzero() == inside  # nothing landed elsewhere

    count = ROWS * COLUMNS
    weight = whole._replace(codes=packed[: count // 2], absmax=absmax[: count // BLOCK], shape=(ROWS, COLUMNS))
    for batch in (1, 40):  # straight from 4 bits; by panels
        rows = torch.tensor(sorted({min(edge // COLUMNS, ROWS - 1) for edge in EDGES}))
        inputs = torch.randn(batch, COLUMNS, generator=generator).bfloat16()
        y = ops.linear_4bit(inputs, weight)
        few = [weight.rows(row, row + 1) for row in rows.tolist()]
        dense = torch.cat([ops.dequantize_4bit(row, torch.float32) for row in few]).double()
        wanted = F.linear(inputs.double(), dense)
        torch.testing.assert_close(y[:, rows].double(), wanted, rtol=2**-7, atol=0.5)  # values of about 90
        assert y.isfinite().all() and y.count_nonzero() <= batch * 2 * len(rows)
    grad = torch.zeros(1, ROWS, dtype=torch.bfloat16)
    grad[0, rows] = torch.randn(len(rows), generator=generator).bfloat16()
    dx = torch.ops.peftcore.linear_4bit_backward(grad, *weight.operands())
    torch.testing.assert_close(dx.double(), grad[:, rows].double() @ dense, rtol=2**-7, atol=0.02)

    out = ops.dequantize_4bit(whole)
    nonzero = 0
    for part in windows():
        wanted = ops.dequantize_4bit(small[part.start])
        assert torch.equal(out[part], wanted)
        nonzero += int(wanted.count_nonzero())
    assert out.view(torch.int16).bitwise_and_(0x7FFF).count_nonzero() == nonzero
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    assert peak < PEAK_GB, f"took {peak:.1f} GB"
