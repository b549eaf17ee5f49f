"""What launches of CUDA kernels do on the host, over a fake CUDA runtime."""

import shutil
import subprocess
from pathlib import Path

import pytest
from support.compiled import compiled

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_shared_memory_is_asked_for_once_for_each_device_and_kernel():
    flags = ["-std=c++17", "-O1", "-pthread", f"-I{HERE / 'fake_cuda'}", f"-I{CSRC}", "-Wall", "-Wextra"]
    done = subprocess.run(
        [compiled("launch", [HERE / "cuda_launch.cpp"], "g++", flags)], capture_output=True, text=True
    )
    first, once, second, larger, refused, asked = map(int, done.stdout.split())
    assert (first, second, refused) == (1, 1, 1)
    assert (once, larger) == (2, 6)  # two devices; another kernel and a larger size on both
    assert asked == 8  # a refusal is not remembered
