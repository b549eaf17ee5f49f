"""Run the cases of correctness.

    python -m card_stages.correctness --results FILE --until SECONDS [--emulator] [--most N] [--table MODULE] [--list]

The names of all cases are in `cases.json` next to the results. Crashes, hangs and CUDA errors are faults: after two of
them the remaining cases of a function do not run.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections import Counter
from typing import Any

import torch
from card.table import Case, Place

from card_stages.jobs import Job, run_job, stage_parser
from card_stages.results import PASSED, Results

MOST_FAULTS = 2  # of a function


def place_of(emulator: bool) -> Place:
    if not emulator:
        if not torch.cuda.is_available():
            sys.exit("card.py needs a GPU, and PyTorch sees none. Without one: --emulator")
        from peftcore.ops.build_info import build_info

        info = build_info()
        if not info.cuda_architectures:  # references would pass every case
            sys.exit(f"no CUDA kernels to prove: {info.missing_because or info.cuda_missing_because}")
        return Place(torch.device("cuda"))
    from card.emulated import library

    library()
    return Place(torch.device("cpu"), emulated=True)


def job_of(case: Case, place: Place) -> Job:
    def run() -> dict[str, Any]:
        return {"status": PASSED, "detail": case.run(place) or ""}

    return Job(case.name, run, case.slow, case.ends_process)


def strict_numbers() -> None:
    """Make PyTorch's own products as exact as the bounds assume."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def first_of_each(cases: list[Case], most: int | None) -> list[Case]:
    """Return the first `most` cases of each function, in their order; None: all."""
    counts: Counter[str] = Counter()
    chosen = []
    for case in cases:
        counts[case.function] += 1
        if most is None or counts[case.function] <= most:
            chosen.append(case)
    return chosen


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("--emulator", action="store_true")
    parser.add_argument("--most", type=int)
    parser.add_argument("--table", default="card.table")
    parser.add_argument("--list", action="store_true", help="write cases.json, and run nothing")
    options = parser.parse_args()
    cases = importlib.import_module(options.table).all_cases()
    cases = first_of_each([case for case in cases if case.emulated or not options.emulator], options.most)
    options.results.with_name("cases.json").write_text(json.dumps([case.name for case in cases], indent=0) + "\n")
    if options.list:
        return
    strict_numbers()
    results, place = Results(options.results), place_of(options.emulator)
    known = results.names("correctness")
    faults = Counter(row["name"].partition("[")[0] for row in results if row.get("fault"))
    for case in cases:
        if case.name in known or faults[case.function] >= MOST_FAULTS:
            continue
        if time.time() > options.until:
            break
        run_job(job_of(case, place), "correctness", results)


if __name__ == "__main__":
    main()
