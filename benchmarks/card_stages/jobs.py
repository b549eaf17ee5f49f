"""Jobs of a stage, run one after another in a process that a wrong kernel may end.

The row of a job is on the disk before the next job begins. The file `running` next to the results has the name of the
current job, with "slow" on a second line if the job may take minutes. After a CUDA error the GPU is unusable for the
process: it ends with code START_AGAIN, and its caller starts another one for the remaining jobs.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from card.table import Skip

from card_stages.results import FAILED, MEASURED, SKIPPED, START_AGAIN, TIME_WAS_UP, Results


class Job(NamedTuple):
    """A call that returns the fields of its row, such as `status` and `detail`.

    Args:
        slow: whether it may take minutes, because it compiles or starts processes.
        ends_process: whether a new process must run the remaining jobs.
    """

    name: str
    run: Callable[[], dict[str, Any]]
    slow: bool = False
    ends_process: bool = False


def stage_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Return a parser of the arguments that all stages have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True, help="time.time() after which no job begins")
    return parser


def run_job(job: Job, stage: str, results: Results) -> None:
    """Run a job and add its row. End the process if the job leaves the GPU unusable for it."""
    results.path.with_name("running").write_text(f"{job.name}\n{'slow' if job.slow else ''}")
    began = time.time()
    row = attempt(job.run)
    results.add(stage, job.name, row.pop("status"), time.time() - began, **row)
    if row.get("fault") or job.ends_process:
        sys.stdout.flush()
        os._exit(START_AGAIN)


def attempt(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the fields of a job's row. `fault` means that the GPU is unusable for this process."""
    try:
        row = run()
        synchronize()  # errors of kernels show here
        return row
    except Skip as reason:
        return {"status": SKIPPED, "detail": str(reason)}
    except torch.cuda.OutOfMemoryError as reason:
        return {"status": SKIPPED, "detail": f"out of memory: {str(reason)[:200]}"}
    except Exception as error:
        return {
            "status": FAILED,
            "detail": f"{type(error).__name__}: {error}"[:2000],
            "traceback": "".join(traceback.format_exception(error))[-4000:],
            "fault": is_unusable(error),
        }


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def is_unusable(error: Exception) -> bool:
    """Return whether an error leaves the GPU unusable for this process.

    Our launchers raise RuntimeError for errors of earlier kernels, such as "unspecified launch failure", which CUDA
    reports again at the next call.
    """
    if isinstance(error, torch.AcceleratorError):
        return True
    try:
        synchronize()
    except Exception:
        return True
    return False


def measurement(measure: Callable[[], dict[str, float]], **fields: str) -> Callable[[], dict[str, Any]]:
    """Return a job's call that measures, and frees memory at its end. `fields` are further fields of the row.

    A package that is not installed skips the measurement.
    """

    def run() -> dict[str, Any]:
        try:
            return {"status": MEASURED, "values": measure(), **fields}
        except ModuleNotFoundError as error:
            raise Skip(f"{error.name} is not installed") from None
        finally:
            gc.collect()
            torch.cuda.empty_cache()

    return run


def measure_jobs(stage: str, jobs: Iterable[Job], results: Results, until: float) -> None:
    """Run jobs that have no row yet. Jobs that time leaves out have a row that says so."""
    known = results.names(stage)
    for job in jobs:
        if job.name in known:
            continue
        if time.time() > until:
            results.add(stage, job.name, SKIPPED, detail=TIME_WAS_UP)
        else:
            run_job(job, stage, results)
