"""Stages as processes: the build, the cases, measurements, and NVIDIA's tools."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from card_stages import machine
from card_stages.results import FAILED, PASSED, SKIPPED, START_AGAIN, TIME_WAS_UP, Results

SLOW = 10  # times as much patience with a slow job
MOST_RESTARTS = 20
START = "start of the process"  # a row, if there is no job yet


@dataclass
class Run:
    """A run of the command: its options, results, and when it must be done."""

    out: Path
    results: Results
    until: float
    emulator: bool
    wheels: Path
    patience: float  # seconds after which a job without an end counts as hung
    most: int | None  # cases of each function; None: all
    table: str
    log: Callable[[str], None]

    def left(self) -> float:
        return self.until - time.time()

    def python(self, *arguments: str, log: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a Python with the checkout's modules, in a process group of its own. Its output goes to `log`."""
        with (self.out / log).open("ab") as file:
            return subprocess.Popen(
                [sys.executable, *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=machine.environment(self.wheels) | environment,
                cwd=machine.ROOT,
                preexec_fn=os.setpgrp,
            )


def stop(process: subprocess.Popen[bytes], number: signal.Signals = signal.SIGKILL) -> None:
    """End a process and those that it started."""
    if process.poll() is None:
        os.killpg(process.pid, number)
        process.wait()


def build(run: Run) -> None:
    """Compile the extension for the GPU, unless it was built from these sources for it; a failure has the log."""
    if run.emulator:
        run.results.add("build", "extension", PASSED, detail="the emulator's build is compiled when cases start")
        return
    arch, began = os.environ.get("PEFTCORE_CUDA_ARCHS") or machine.architecture(), time.time()
    reason = machine.build_obstacle(run.wheels, arch)
    if reason:
        run.results.add("build", "extension", FAILED, detail=reason)
        return
    if _built(arch):
        run.results.add("build", "extension", PASSED, detail=f"sm_{arch}, built before")
        return
    settings = {"PEFTCORE_CUDA": "1", "PEFTCORE_REQUIRE_EXT": "1", "PEFTCORE_CUDA_ARCHS": arch}
    log = run.out / "build.log"
    process = run.python("setup.py", "build_ext", "--inplace", log=log.name, **settings)
    try:
        end = f"exit code {process.wait(timeout=max(1, run.left()))}"
    except subprocess.TimeoutExpired:
        end = "no end in time; the same command continues with the files that are compiled"
    finally:
        stop(process, signal.SIGTERM)  # ninja ends its compilers, and keeps what is compiled
    if process.returncode == 0:
        run.results.add("build", "extension", PASSED, time.time() - began, detail=f"sm_{arch}")
    else:
        detail = f"{end}, the whole log is {log.name}:\n{log.read_text(errors='replace')[-3000:]}"
        run.results.add("build", "extension", FAILED, time.time() - began, detail=detail)


def _built(arch: str) -> bool:
    """Return whether there is a binary of these sources with CUDA kernels for this architecture."""
    record = machine.ROOT / "peftcore" / "_build.json"
    if not record.exists():
        return False
    facts = json.loads(record.read_text())
    sys.path.insert(0, str(machine.ROOT / "peftcore" / "ops"))
    try:
        from _sources import digest
    finally:
        del sys.path[0]
    current = facts.get("sources") == digest(machine.ROOT / "csrc")
    return current and facts.get("built", False) and f"sm_{arch}" in facts.get("cuda_architectures", ())


def run_stage(run: Run, stage: str, arguments: Sequence[str] = (), **environment: str) -> bool:
    """Run a stage in a process of its own. After a crash, a hang or a CUDA error, another one takes the rest.

    Returns:
        Whether all jobs were reached.
    """
    running = run.out / "running"
    for _ in range(MOST_RESTARTS):
        running.unlink(missing_ok=True)
        common = "--results", str(run.results.path), "--until", str(run.until)
        process = run.python("-m", f"card_stages.{stage}", *common, *arguments, log=f"{stage}.log", **environment)
        try:
            end = _watch(run, process, running)
        finally:
            stop(process)
        name = running.read_text().partition("\n")[0] if running.exists() else ""
        running.unlink(missing_ok=True)
        if process.returncode == 0:
            return True
        if process.returncode == START_AGAIN:
            run.log(f"{stage}: a new process runs the rest after {name}")
        elif end == TIME_WAS_UP:
            run.results.add(stage, name or START, SKIPPED, detail=end)
            return False
        elif name:
            run.results.add(stage, name, FAILED, detail=end, fault=True)
            run.log(f"{name}: {end}")
        else:
            text = (run.out / f"{stage}.log").read_text(errors="replace").strip()
            detail = f"{end}: {text.rpartition(chr(10))[2]}\n{text[-3000:]}"
            run.results.add(stage, START, FAILED, detail=detail)
            return False
    run.log(f"{stage}: {MOST_RESTARTS} processes ended early, so the rest does not run")
    return False


def _watch(run: Run, process: subprocess.Popen[bytes], running: Path) -> str:
    """Wait for the process, and kill it when its job hangs or long after the time is up. Return how it ended."""
    job, since = "", time.time()
    while process.poll() is None:
        current = running.read_text() if running.exists() else ""
        if current != job:
            job, since = current, time.time()
        # Before the first job the process imports PyTorch, and the emulator's build may be compiled.
        patience = run.patience * (SLOW if job.endswith("slow") else 1)
        if job and time.time() - since > patience:
            stop(process)
            return f"no end within {patience:g} seconds"
        if not run.emulator and run.left() < -run.patience:
            stop(process)
            return TIME_WAS_UP
        time.sleep(0.2)
    return f"the process ended with code {process.returncode}"


def case_options(run: Run) -> list[str]:
    most = [] if run.most is None else ["--most", str(run.most)]
    return [*most, "--table", run.table, *(["--emulator"] if run.emulator else [])]


# Settings of PEFTCORE_CUDA_TUNING, and the kinds of work (tuning.py) that each is timed with.
SETTINGS = {
    "": ("few rows", "panel", "low rank", "dequantize", "quantize", "step"),
    "one_launch_rows=0": ("few rows",),
    "panel_rows=8": ("panel",),
    "clusters=0": ("panel",),
    "panel_blocks=64": ("panel",),
    "panel_blocks=256": ("panel",),
    "panel_blocks=300": ("panel",),
    "down_blocks=132": ("low rank",),
    "down_blocks=528": ("low rank",),
    "reduce_blocks=132": ("low rank",),
    "reduce_blocks=528": ("low rank",),
    "loop_blocks=1024": ("dequantize",),
    "loop_blocks=16384": ("dequantize",),
    "quantize_blocks=528": ("quantize",),
    "quantize_blocks=4224": ("quantize",),
    "step_blocks=528": ("step",),
    "step_blocks=4224": ("step",),
}


def tuning(run: Run) -> None:
    """Time each setting in a process of its own, because the extension reads it once."""
    for setting, work in SETTINGS.items():
        if run.left() < run.patience:
            run.results.add("tuning", setting or "as built", SKIPPED, detail=TIME_WAS_UP)
        elif not run_stage(run, "tuning", work, PEFTCORE_CUDA_TUNING=setting):
            return


# Calls of tests/card/runtime.py, of every kind of kernel.
CALLS = ("one_launch", "split_columns", "clusters", "experts_few", "experts_dense", "four_bits")
PROFILE = ["--section", "SpeedOfLight", "--section", "Occupancy", "--section", "LaunchStats", "--clock-control", "none"]
PROFILE += ["--kernel-name-base", "demangled", "--kernel-name", "regex:peftcore"]
# In blocks of PyTorch's allocator, which hold several tensors, memcheck would not see an overrun.
NO_CACHE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def tools(run: Run) -> None:
    """Run compute-sanitizer's memcheck and racecheck and Nsight Compute's profile over six calls."""
    if run.emulator:
        run.results.add("tools", "compute-sanitizer", SKIPPED, detail="the emulator has tests of its own")
        return
    for check in ("memcheck", "racecheck"):
        options = ["--tool", check, "--error-exitcode", "9", "--kernel-name", "kernel_substring=peftcore"]
        for call in CALLS:
            _run_tool(run, "compute-sanitizer", check, options, call, "SUMMARY")
    for call in CALLS:
        _run_tool(run, "ncu", "profile", PROFILE, call, "Duration")


def _run_tool(run: Run, program: str, check: str, options: list[str], call: str, expected: str) -> None:
    """Run a tool over a call. Its log is in `out`, and a line of it with the expected text in the row."""
    name = f"{check}[{call}]"
    if name in run.results.names("tools"):
        return
    path = machine.tool(program)
    if path is None or run.left() < run.patience:
        run.results.add("tools", name, SKIPPED, detail=f"{program} was not found" if path is None else TIME_WAS_UP)
        return
    began, log = time.time(), run.out / f"{check}-{call}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [path, *options, sys.executable, "-m", "card_stages.one_call", call],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=machine.environment(run.wheels) | (NO_CACHE if check == "memcheck" else {}),
            cwd=machine.ROOT,
            preexec_fn=os.setpgrp,
        )
        try:
            process.wait(timeout=min(SLOW * run.patience, run.left()))
        except subprocess.TimeoutExpired:
            run.results.add("tools", name, SKIPPED, time.time() - began, detail="no end in time")
            return
        finally:
            stop(process)
    text = log.read_text(errors="replace")
    lines = [line.strip("= ") for line in text.splitlines() if expected in line]
    if not lines:  # the tool did not start, as in a container that forbids debugging
        run.results.add("tools", name, SKIPPED, time.time() - began, detail=text[-1000:])
    else:
        status = FAILED if process.returncode else PASSED
        run.results.add("tools", name, status, time.time() - began, detail=lines[-1])
