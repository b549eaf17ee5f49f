"""The CPU kernels on 64-bit ARM, cross-compiled and run under qemu, each level compared with sums in double.

Arithmetic that no processor rounds differently gives the same bits as this machine's kernels of plain C++. These tests
check results; nobody has measured speed on hardware. `make test` runs every fifth case, `make test-all` all of them.

apt install g++-aarch64-linux-gnu qemu-user
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.compiled import compiled, unit
from support.levels import LEVELS_OF
from support.setup_file import setup_file

ROOT = Path(__file__).resolve().parents[2]
CSRC, TESTS = ROOT / "csrc", ROOT / "tests" / "csrc" / "kernels"
FLAGS = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
CROSS, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
SHARED = ("cpu/levels.cpp", "gemm/cpu/product.cpp", "optim/dynamic8.cpp", "common/caches.cpp", "common/workspace.cpp")
FAMILIES = ("quant4", "linear", "gemm", "lora", "optim")
pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("g++", CROSS, QEMU))), reason=f"no g++, {CROSS} or {QEMU}: see the file's docstring"
)


def built(compiler: str, levels: tuple[str, ...]) -> str:
    """Return the path of a program of the kernels of `levels`, without PyTorch, and their tests."""
    simd = setup_file().toolchain.SIMD
    flags = [*FLAGS, f"-I{CSRC}", f"-I{TESTS}", *(f"-DPEFTCORE_HAVE_{level.upper()}" for level in levels[1:])]
    # In one file, since each includes the same headers.
    tests = "".join(f'#include "{path}"\n' for path in sorted(TESTS.glob("*.cpp")))
    sources = [path for path in sorted(CSRC.rglob("*.cpp")) if path.stem in levels]
    sources += [*(CSRC / name for name in SHARED), unit("kernels_tests", tests)]
    return str(compiled("kernels", sources, compiler, flags, ["-static"], lambda path: simd.get(path.stem, [])))


def results(*command: str) -> dict[tuple[str, str], tuple[int, str]]:
    """Return, for each level and family, how many cases agree with sums in double, and a digest of all results."""
    environment = {key: value for key, value in os.environ.items() if key != "PEFTCORE_CPU_LEVEL"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return {(level, family): (int(cases), digest) for level, family, cases, digest in lines}


def levels_of(found: dict[tuple[str, str], tuple[int, str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(level for level, _ in found))


@pytest.fixture(scope="module")
def binary() -> str:
    return built(CROSS, LEVELS_OF["64-bit ARM"])


@pytest.fixture(scope="module")
def all_levels(binary: str) -> dict[tuple[str, str], tuple[int, str]]:
    return results(QEMU, "-cpu", "max", binary)


def check_same_bits(found: dict[tuple[str, str], tuple[int, str]]) -> None:
    """Check that families whose arithmetic all levels share give the same bits at each level."""
    for family in ("quant4", "optim"):
        assert {found[level, family] for level in levels_of(found)} == {found["portable", family]}


def test_a_fifth_of_the_cases_agrees_with_sums_in_double_at_every_level(binary):
    found = results(QEMU, "-cpu", "max", binary, "brief")
    assert levels_of(found) == ("portable", "neon", "neonbf16")
    empty = {("portable", "linear"), ("portable", "gemm"), ("neon", "gemm")}
    assert {key for key, (cases, _) in found.items() if cases == 0} == empty
    check_same_bits(found)


@pytest.mark.nightly
def test_every_level_agrees_with_sums_in_double(all_levels):
    assert levels_of(all_levels) == ("portable", "neon", "neonbf16")
    cases = {level: [all_levels[level, family][0] for family in FAMILIES] for level in levels_of(all_levels)}
    assert cases == {
        "portable": [72, 0, 0, 180, 15],
        "neon": [72, 1200, 0, 180, 15],
        "neonbf16": [72, 1104, 126, 180, 15],
    }
    check_same_bits(all_levels)


@pytest.mark.nightly
def test_plain_kernels_have_this_machine_s_bits(all_levels):
    here = results(built("g++", ("portable",)))
    assert levels_of(here) == ("portable",)
    assert here == {key: found for key, found in all_levels.items() if key[0] == "portable"}


@pytest.mark.nightly
def test_a_processor_without_products_of_bf16_runs_what_it_has(binary, all_levels):
    found = results(QEMU, "-cpu", "cortex-a57", binary)
    assert levels_of(found) == ("portable", "neon")
    assert all(found[key] == all_levels[key] for key in found)
