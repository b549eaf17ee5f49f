"""Stages that run other programs: the build, the cases, and compute-sanitizer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from card_stages import machine
from card_stages.results import FAILED, PASSED, SKIPPED, Results

START_AGAIN = 77  # the worker's exit code after an error that leaves the card unusable for it
SLOW = 10  # times as much patience with a slow case


@dataclass
class Run:
    """A run of the command: its options, results, and when it must be done."""

    out: Path
    results: Results
    until: float
    emulator: bool
    wheels: Path
    patience: float  # seconds after which a case without an end counts as hung
    most: int | None  # cases of each function; None: all
    table: str
    log: Callable[[str], None]

    def left(self) -> float:
        return self.until - time.time()

    def python(self, *arguments: str, log: str) -> subprocess.Popen[bytes]:
        """Start a Python with the checkout's modules, whose output goes to a file of `out`."""
        with (self.out / log).open("ab") as file:
            command = [sys.executable, *arguments]
            return subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=machine.environment(self.wheels), cwd=machine.ROOT
            )


def build(run: Run) -> None:
    """Compile the extension for the card, unless it was built from these sources for it; a failure has the log."""
    if run.emulator:
        run.results.add("build", "extension", PASSED, detail="the emulator's build is compiled when cases start")
        return
    if "extension" in run.results.names("build") and _built():
        return
    lacking = machine.missing(run.wheels)
    if lacking:
        run.results.add("build", "extension", FAILED, detail=machine.how_to_carry(lacking, run.wheels))
        return
    if machine.headers_missing():
        run.results.add("build", "extension", FAILED, detail=machine.headers_missing())
        return
    arch, began = os.environ.get("PEFTCORE_CUDA_ARCHS") or machine.architecture(), time.time()
    if not arch:
        run.results.add(
            "build", "extension", FAILED, detail="neither nvidia-smi nor PyTorch sees a card. Without one: --emulator"
        )
        return
    settings = {"PEFTCORE_CUDA": "1", "PEFTCORE_REQUIRE_EXT": "1", "PEFTCORE_CUDA_ARCHS": arch}
    log = run.out / "build.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=machine.environment(run.wheels) | settings,
            cwd=machine.ROOT,
        )
        try:
            how = f"exit code {process.wait(timeout=max(1, run.left()))}"
        except subprocess.TimeoutExpired:
            process.terminate()  # ninja keeps what is compiled: the next call goes on from there
            process.wait()
            how = "no end in time; the same command goes on from there"
    passed, text = process.returncode == 0, log.read_text(errors="replace")
    detail = f"sm_{arch}" if passed else f"{how}, the whole log is {log.name}:\n{text[-3000:]}"
    run.results.add("build", "extension", PASSED if passed else FAILED, time.time() - began, detail=detail)


def _built() -> bool:
    """Return whether there is a binary with CUDA kernels of these sources."""
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
    return bool(facts.get("built") and facts.get("cuda_architectures") and current)


def correctness(run: Run) -> None:
    """Run the cases in a process of their own. After a crash, a hang or an error of CUDA another one takes the rest."""
    running, restarts = run.out / "running", 0
    while restarts <= 20:
        running.unlink(missing_ok=True)
        code = _watched(run, run.python(*worker_arguments(run), log="correctness.log"), running)
        if code == 0:
            return
        restarts += 1
        if code == START_AGAIN:
            run.log("an error of CUDA ended the process: another one runs the rest")
            continue
        name = running.read_text().partition("\n")[0] if running.exists() else ""
        if not name:
            tail = (run.out / "correctness.log").read_text(errors="replace")[-3000:]
            run.results.add("correctness", "start of the worker", FAILED, detail=f"exit code {code}:\n{tail}")
            return
        how = f"no end within {run.patience:g} seconds" if code is None else f"the process ended with code {code}"
        run.results.add("correctness", name, FAILED, detail=how, fault=True)
        run.log(f"{name}: {how}")
    run.log("more than 20 processes ended early: the rest of the cases does not run")


def worker_arguments(run: Run) -> list[str]:
    arguments = ["-m", "card_stages.worker", "--results", str(run.results.path), "--until", str(run.until)]
    arguments += [] if run.most is None else ["--most", str(run.most)]
    return [*arguments, "--table", run.table, *(["--emulator"] if run.emulator else [])]


def _watched(run: Run, process: subprocess.Popen[bytes], running: Path) -> int | None:
    """Wait for the process, and kill it when its case does not end; return its exit code, None for a killed one."""
    case, since = "", time.time()
    while process.poll() is None:
        now = running.read_text() if running.exists() else ""
        if now != case:
            case, since = now, time.time()
        # Before the first case the worker imports PyTorch, and the emulator's build may be compiled.
        if case and time.time() - since > run.patience * (SLOW if case.endswith("slow") else 1):
            process.kill()
            process.wait()
            return None
        time.sleep(0.2)
    return process.returncode


# Calls of tests/card/runtime.py, of every kind of kernel.
SANITIZED = ("one_launch", "split_columns", "clusters", "experts_few", "experts_dense", "four_bits")


def sanitizer(run: Run) -> None:
    """Run compute-sanitizer's memcheck and racecheck over six calls, where the tool is."""
    tool = shutil.which("compute-sanitizer") or next(
        (str(path) for path in Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None
    )
    if run.emulator or tool is None:
        why = "the emulator has tests of its own" if run.emulator else "compute-sanitizer was not found"
        run.results.add("sanitizer", "compute-sanitizer", SKIPPED, detail=why)
        return
    known = run.results.names("sanitizer")
    for check in ("memcheck", "racecheck"):
        for call in SANITIZED:
            name = f"{check}[{call}]"
            if name in known:
                continue
            if run.left() < 20:
                run.results.add("sanitizer", name, SKIPPED, detail="the time was up")
                continue
            began = time.time()
            command = [tool, "--tool", check, "--error-exitcode", "9", "--kernel-name", "kernel_substring=peftcore"]
            command += [sys.executable, "-m", "card_stages.one_call", call]
            try:
                done = subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    # In blocks of PyTorch's allocator, which hold several tensors, an overrun would not be seen.
                    env=machine.environment(run.wheels) | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                    cwd=machine.ROOT,
                    timeout=max(20, min(SLOW * run.patience, run.left())),
                )
            except subprocess.TimeoutExpired:
                run.results.add("sanitizer", name, SKIPPED, time.time() - began, detail="no end in time")
                continue
            (run.out / f"{check}-{call}.log").write_text(done.stdout + done.stderr)
            summary = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
            detail = summary[-1].strip("= ") if summary else (done.stdout + done.stderr)[-1000:]
            # Without a summary the tool did not check anything, as in a container that forbids debugging.
            status = SKIPPED if not summary else FAILED if done.returncode else PASSED
            run.results.add("sanitizer", name, status, time.time() - began, detail=detail)
