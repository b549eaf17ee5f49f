"""Prove every CUDA kernel on the card at hand, and time them: one command for a bare machine without a network.

    python benchmarks/card.py --out DIR [--seconds 560] [--resume DIR/results.json] [--only STAGE ...] [--list]
                              [--pack FILE.tgz] [--commit NAME]
    python benchmarks/card.py --out DIR --emulator        (without a card: the kernels on the CPU, correctness alone)

Stages: build, correctness, sanitizer, timings, training, decoding, report. Each row is on the disk as soon as it is
known, so that a run that is cut off goes on with --resume. docs/card.md describes what the machine must have.

The exit code is 0 if every check of build, correctness and sanitizer passed, 1 if one failed, and 3 if none failed but
the time was up before all had run. Timings do not change it.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# In place of this folder, whose `card` is this file: the cases are the package tests/card.
sys.path[:1] = [str(ROOT / "tests"), str(ROOT), str(ROOT / "benchmarks")]

from card_stages.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(__doc__))
