"""The CPU kernels on 64-bit ARM, cross-compiled and run under qemu, each level beside sums in double.

What no processor rounds otherwise has the bits of this machine's kernels of plain C++. This is about results: how fast
they are on silicon, nobody has measured.

apt install g++-aarch64-linux-gnu qemu-user
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from setup_file import setup_file

from peftcore.ops.build_info import LEVELS

ROOT = Path(__file__).resolve().parents[2]
CSRC, TESTS = ROOT / "csrc", ROOT / "tests" / "csrc" / "kernels"
FLAGS = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
CROSS, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
SHARED = ("cpu/levels.cpp", "gemm/cpu/product.cpp", "optim/dynamic8.cpp", "common/caches.cpp", "common/workspace.cpp")
ROOMS = ("quant4", "linear", "gemm", "lora", "optim")
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(not all(map(shutil.which, ("g++", CROSS, QEMU))), reason=f"no g++, {CROSS} or {QEMU}"),
]


def built(compiler: str, levels: tuple[str, ...], folder: Path) -> str:
    """The kernels of these levels, without PyTorch, and their tests."""
    simd = setup_file().SIMD
    common = [*FLAGS, f"-I{CSRC}", f"-I{TESTS}", *(f"-DPEFTCORE_HAVE_{level.upper()}" for level in levels[1:])]
    sources = [path for path in CSRC.rglob("*.cpp") if path.stem in levels]
    sources += [*(CSRC / name for name in SHARED), *TESTS.glob("*.cpp")]

    def compiled(source: Path) -> str:
        target = folder / ("-".join(source.relative_to(ROOT).parts) + ".o")
        command = [compiler, *common, *simd.get(source.stem, []), "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return str(target)

    folder.mkdir()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    subprocess.run([compiler, *objects, "-static", "-o", str(folder / "kernels")], check=True)
    return str(folder / "kernels")


def results(*command: str) -> dict[tuple[str, str], tuple[int, str]]:
    """Of each level and room, how many cases agree with sums in double, and the digest of all results."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return {(level, room): (int(cases), digest) for level, room, cases, digest in lines}


def levels_of(found: dict[tuple[str, str], tuple[int, str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(level for level, _ in found))


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> str:
    return built(CROSS, LEVELS["64-bit ARM"], tmp_path_factory.mktemp("aarch64") / "there")


@pytest.fixture(scope="module")
def all_levels(binary: str) -> dict[tuple[str, str], tuple[int, str]]:
    return results(QEMU, "-cpu", "max", binary)


def test_every_level_agrees_with_sums_in_double(all_levels):
    assert levels_of(all_levels) == ("portable", "neon", "neonbf16")
    cases = {level: [all_levels[level, room][0] for room in ROOMS] for level in levels_of(all_levels)}
    assert cases == {
        "portable": [72, 0, 0, 180, 15],
        "neon": [72, 1088, 0, 180, 15],
        "neonbf16": [72, 1034, 126, 180, 15],
    }


def test_the_arithmetic_that_levels_share_gives_the_same_bits(all_levels):
    for room in ("quant4", "optim"):
        assert {all_levels[level, room] for level in levels_of(all_levels)} == {all_levels["portable", room]}


def test_plain_kernels_have_this_machine_s_bits(all_levels, tmp_path):
    here = results(built("g++", ("portable",), tmp_path / "here"))
    assert levels_of(here) == ("portable",)
    assert here == {key: found for key, found in all_levels.items() if key[0] == "portable"}


def test_a_processor_without_products_of_bf16_runs_what_it_has(binary, all_levels):
    found = results(QEMU, "-cpu", "cortex-a57", binary)
    assert levels_of(found) == ("portable", "neon")
    assert all(found[key] == all_levels[key] for key in found)
