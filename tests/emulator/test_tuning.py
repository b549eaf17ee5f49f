"""The table of numbers by GPU (csrc/common/cuda_tuning.h)."""

from ctypes import POINTER, Structure, c_int

import pytest
from emulator import building
from support import fresh_process

FIELDS = "architecture down_blocks reduce_blocks panel_blocks loop_blocks quantize_blocks step_blocks"
FIELDS += " one_launch_rows panel_rows clusters"
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
    orders = {(t.down_blocks, t.reduce_blocks, t.panel_blocks, t.panel_rows) for t in map(tuning_of, (80, 90))}
    assert orders == {(264, 264, 128, 64)}


LAUNCHES = """
import ctypes, sys, torch
from peftcore import ops
weight = ops.quantize_4bit(torch.ones(8, 64), double_quant=True)
operators = ctypes.CDLL(sys.argv[1])
operators.emulator_launches.restype = ctypes.c_uint64
x, a, b = torch.ones(1, 64, dtype=torch.half), torch.ones(4, 64), torch.ones(8, 4)
before = operators.emulator_launches()
torch.ops.peftcore.lora_linear(x, *weight.operands(), None, a, b, 1.0)
print(operators.emulator_launches() - before)
"""


@pytest.fixture(scope="module")
def launches_under():
    cxx = building.compiler()
    if cxx is None:
        pytest.skip("no g++")
    path = str(building.library_of_operators(cxx))
    return lambda setting: fresh_process.run(LAUNCHES, path, PEFTCORE_CUDA_TUNING=setting)


@pytest.mark.parametrize(
    ("setting", "launches"), [("", 1), ("one_launch_rows=0", 2), ("clusters=0,one_launch_rows=0", 2)]
)
def test_a_setting_replaces_values_of_the_table(launches_under, setting, launches):
    done = launches_under(setting)
    assert (done.returncode, done.stdout) == (0, f"{launches}\n"), done.stderr


@pytest.mark.parametrize("setting", ["panel=1", "clusters", "clusters=yes", "panel_blocks=0", "clusters=1 "])
def test_an_invalid_setting_is_an_error(launches_under, setting):
    done = launches_under(setting)
    assert done.returncode != 0 and "PEFTCORE_CUDA_TUNING must list columns" in done.stderr
    assert f"found '{setting}'" in done.stderr
