"""Page store of a GPU over a fake CUDA runtime: failed calls lose no page and publish no event."""

import shutil
import subprocess
from pathlib import Path

import pytest
from support.compiled import compiled

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_a_call_that_fails_loses_no_page_and_publishes_no_event():
    sources = [ROOT / "tests" / "csrc" / "cuda_store.cpp", ROOT / "csrc" / "optim" / "pool.cpp"]
    flags = ["-std=c++20", "-O0", "-fsanitize=address,undefined", f"-I{ROOT / 'csrc'}", "-Wall", "-Wextra"]
    done = subprocess.run([compiled("store", sources, "g++", flags)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stdout + done.stderr
