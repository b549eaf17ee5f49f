"""The table of numbers by GPU (csrc/common/cuda_tuning.h)."""

from ctypes import POINTER, Structure, c_int

import pytest

FIELDS = "architecture down_blocks reduce_blocks panel_blocks loop_blocks quantize_blocks step_blocks"
ROWS = [(75, 80), (80, 80), (86, 80), (89, 80), (90, 90), (100, 90), (120, 90)]


class CudaTuning(Structure):
    _fields_ = [(name, c_int) for name in FIELDS.split()]


@pytest.fixture(scope="module")
def tuning_of(emulated_library):
    function = emulated_library.peftcore_cuda_tuning_of
    function.restype = POINTER(CudaTuning)
    return lambda architecture: function(architecture).contents


@pytest.mark.parametrize(("architecture", "row"), ROWS)
def test_a_row_applies_up_to_the_next(tuning_of, architecture, row):
    assert tuning_of(architecture).architecture == row


def test_all_rows_give_the_same_sums(tuning_of):
    """Their order depends on these numbers, and results are the same on every GPU."""
    orders = {(t.down_blocks, t.reduce_blocks, t.panel_blocks) for t in map(tuning_of, (80, 90))}
    assert orders == {(264, 264, 128)}
