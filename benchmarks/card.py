"""Test every CUDA kernel on a GPU, and time them: one command for a bare machine without a network.

    python benchmarks/card.py --out DIR [--seconds 560] [--resume DIR/results.json] [--only STAGE ...] [--list]
                              [--pack FILE.tgz] [--commit NAME]
    python benchmarks/card.py --out DIR --emulator        (without a GPU: the kernels on the CPU, only correctness)

Stages: build, correctness, tools, timings, tuning, training, decoding. Each row is on the disk before the next begins,
so an interrupted run continues with --resume. docs/card.md is the plan of a day with a GPU, and lists what the machine
must have.

The exit code is 0 if every check of build, correctness and tools passed, 1 if one failed, and 3 if none failed but time
ran out before all had run. Timings do not change it.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# In place of this folder, whose `card` is this file: the cases are the package tests/card.
sys.path[:1] = [str(ROOT / "tests"), str(ROOT), str(ROOT / "benchmarks")]

from card_stages.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(__doc__))
