"""`apply`, a forward pass, `save`, `load` and `merge` stay within the calls, files and depth of benchmarks/trace.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "trace.py"


@pytest.mark.nightly
def test_counts_are_within_their_limits() -> None:
    process = subprocess.run(
        [sys.executable, "-W", "ignore", SCRIPT],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stdout + process.stderr[-2_000:]
