"""`apply`, a forward pass, `save`, `load` and `merge` stay within the calls, files and depth of benchmarks/trace.py."""

from pathlib import Path

import fresh_process
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "trace.py"
CODE = """
import runpy, sys
import bitsandbytes, peft  # a user may have imported them: no count depends on that
sys.argv[1:] = ["--ours"]
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.slow
def test_counts_are_within_their_limits() -> None:
    done = fresh_process.run(CODE.format(script=str(SCRIPT)), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr[-2_000:]
