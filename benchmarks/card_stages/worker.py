"""Run cases of correctness, in a process that a wrong kernel may end.

    python -m card_stages.worker --results FILE --until SECONDS [--emulator] [--most N] [--table MODULE] [--list]

The names of all cases are in `cases.json` next to the results, and the name of the case that runs is in `running`, with
"slow" on a second line if it may take a minute. An error of CUDA leaves the device unusable for the process: the worker
then ends with code 77, and its caller starts another one for the rest. Crashes, hangs and such errors are faults: after
two of them the other cases of a function do not run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from card.table import Case, Place, Skip

from card_stages.results import FAILED, PASSED, SKIPPED, Results

START_AGAIN = 77
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


def run(case: Case, place: Place) -> dict[str, Any]:
    """Run a case and return its row, without the stage."""
    began, found = time.perf_counter(), {"status": PASSED}
    try:
        found["detail"] = case.run(place) or ""
        if not place.emulated:
            torch.cuda.synchronize()  # errors of kernels show here
    except Skip as reason:
        found = {"status": SKIPPED, "detail": str(reason)}
    except torch.cuda.OutOfMemoryError as reason:
        found = {"status": SKIPPED, "detail": f"out of memory: {str(reason)[:200]}"}
    except Exception as error:
        found = {"status": FAILED, "detail": f"{type(error).__name__}: {error}"[:2000]}
        found["traceback"] = "".join(traceback.format_exception(error))[-4000:]
        found["fault"] = is_unusable(place, error)
    found |= {"name": case.name, "seconds": time.perf_counter() - began}
    if place.emulated:
        from card.emulated import launch_sites
        from card.launch_sites import reached

        found["kernels"] = sorted(f"{kernel.file}:{kernel.name}" for kernel in reached(launch_sites()))
    return found


def is_unusable(place: Place, error: Exception) -> bool:
    """Return whether an error leaves the card unusable for this process."""
    if isinstance(error, torch.AcceleratorError):
        return True
    try:
        if not place.emulated:
            torch.cuda.synchronize()
    except Exception:
        return True
    return False


def strict_numbers() -> None:
    """Make PyTorch's own products as exact as the bounds assume."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def first_ones(cases: list[Case], most: int | None) -> list[Case]:
    """Return the first `most` cases of each function, in their order; None: all."""
    ranks: Counter[str] = Counter()
    found = []
    for case in cases:
        ranks[case.function] += 1
        if most is None or ranks[case.function] <= most:
            found.append(case)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True, help="time.time() at which no further case begins")
    parser.add_argument("--emulator", action="store_true")
    parser.add_argument("--most", type=int)
    parser.add_argument("--table", default="card.table")
    parser.add_argument("--list", action="store_true", help="write cases.json, and run nothing")
    options = parser.parse_args()
    cases = importlib.import_module(options.table).all_cases()
    cases = first_ones([case for case in cases if case.emulated or not options.emulator], options.most)
    options.results.with_name("cases.json").write_text(json.dumps([case.name for case in cases], indent=0) + "\n")
    if options.list:
        return
    strict_numbers()
    results, place = Results(options.results), place_of(options.emulator)
    known, running = results.names("correctness"), options.results.with_name("running")
    faults = Counter(row["name"].partition("[")[0] for row in results if row.get("fault"))
    for case in cases:
        if case.name in known or faults[case.function] >= MOST_FAULTS:
            continue
        if time.time() > options.until:
            return
        running.write_text(f"{case.name}\n{'slow' if case.slow else ''}")
        row = results.add("correctness", **run(case, place))
        if row.get("fault"):
            sys.stdout.flush()
            os._exit(START_AGAIN)
    running.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
