"""The kernels of plain C++ on 64-bit ARM, cross-compiled and run under qemu: with the bits of this machine.

apt install g++-aarch64-linux-gnu qemu-user
"""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
CROSS, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"


def built(compiler: str, target: Path) -> str:
    kernels = [ROOT / "csrc" / room / "cpu" / "portable.cpp" for room in ("lora", "nf4", "optim")]
    others = [ROOT / "csrc/optim/dynamic8.cpp", ROOT / "csrc/common/caches.cpp", ROOT / "tests/csrc/kernels.cpp"]
    command = [compiler, *FLAGS, f"-I{ROOT / 'csrc'}", *map(str, [*kernels, *others]), "-static", "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return str(target)


def printed(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not all(map(shutil.which, ("g++", CROSS, QEMU))), reason=f"no g++, {CROSS} or {QEMU}")
def test_plain_kernels_agree_with_sums_in_double_and_with_this_machine(tmp_path: Path) -> None:
    here = printed(built("g++", tmp_path / "here"))
    assert here.startswith("portable: 219 cases")
    assert printed(QEMU, built(CROSS, tmp_path / "there")) == here
