"""One training run in its own process, to measure its peak memory and survive its failure.

FOLDER/run.json       the settings; run.toml has them as options
FOLDER/log.txt        its output
FOLDER/result.json    its results, or
FOLDER/error.txt      why it failed
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peftcore_cli.options import FULL
from peftcore_cli.settings import RUN_FILE, Display, Settings, prepare_folder, write_options

from peftcore import PeftcoreError

_RESULT, _ERROR = "result.json", "error.txt"
STOPPED_STATUS = 130  # exit status of a run that Ctrl-C has stopped


def run(folder: Path, settings: Settings, show: Callable[[str], None]) -> dict[str, Any]:
    """Return the result of a run as in `run_result.Result.to_json`, or {"error": reason}.

    A finished run is not repeated, and an interrupted one continues from its checkpoint. `show` is called with each
    line of the run's output.

    Raises:
        PeftcoreError: the folder contains a run with different settings.
        KeyboardInterrupt: Ctrl-C. The user has stopped the run, which has saved a checkpoint.
    """
    prepare_folder(folder, settings, resume=True, overwrite=False)
    if settings.method != FULL:  # `peftcore train` does not offer full fine-tuning
        write_options(folder, settings, Display())
    if not (folder / _RESULT).exists():
        status = run_child(folder, show)
        if status == STOPPED_STATUS:
            raise KeyboardInterrupt
        if status != 0:
            return {"error": _failure(folder, status)}
    return json.loads((folder / _RESULT).read_text(encoding="utf-8"))


def run_child(folder: Path, show: Callable[[str], None]) -> int:
    """Return the exit status of `main` in its own process."""
    return in_process(main, folder, show)


def in_process(work: Callable[[Path], int], folder: Path, show: Callable[[str], None]) -> int:
    """Run a module-level function in its own process, and return its exit status, or the negative signal number.

    The output is appended to FOLDER/log.txt, and `show` is called with each line.
    """
    child: Any = _context().Process(target=_work, args=(work, folder))
    with open(folder / "log.txt", "a+", encoding="utf-8", errors="replace") as log:
        log.seek(0, os.SEEK_END)
        child.start()
        stopping = False
        while True:
            try:
                child.join(0.2)
                has_ended = child.exitcode is not None  # read before the log, so that no line is lost
                for line in log.readlines():
                    show(line.strip())
                if has_ended:
                    return STOPPED_STATUS if stopping else child.exitcode
            except KeyboardInterrupt:
                if stopping:
                    child.kill()
                    raise
                stopping = True
                child.terminate()


def _context() -> Any:
    """Return the multiprocessing context: spawn, or a fork server with imported libraries, which saves seconds."""
    if sys.platform != "linux" or torch.cuda.is_available():  # CUDA does not work in forked processes
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peftcore_cli.training.training_run"])
    return context


def _work(work: Callable[[Path], int], folder: Path) -> None:
    if hasattr(os, "setsid"):
        os.setsid()  # ignore Ctrl-C: the parent process handles it, and then asks this process to stop
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(encoding="utf-8", line_buffering=True)
    sys.exit(work(folder))


def _failure(folder: Path, status: int) -> str:
    if (folder / _ERROR).exists():
        return (folder / _ERROR).read_text(encoding="utf-8").strip()
    if status == -signal.SIGKILL:
        return "the process was killed, probably because memory ran out"
    last_line = (folder / "log.txt").read_text(encoding="utf-8").strip().rpartition("\n")[2]
    return f"the process ended with status {status}: {last_line}"


def main(folder: Path) -> int:
    """Train with the settings in `folder`, and return the exit status."""
    from peftcore_cli import run_result, training_data, training_run

    settings = Settings(**json.loads((folder / RUN_FILE).read_text(encoding="utf-8")))
    (folder / _ERROR).unlink(missing_ok=True)
    try:
        rows = training_data.read(settings)
        result = training_run.run(settings, folder, rows, resume=(folder / "checkpoints").is_dir())
    except run_result.Stopped:
        return STOPPED_STATUS
    except Exception as error:
        reason = str(error) if isinstance(error, PeftcoreError) else f"{type(error).__name__}: {error}"
        (folder / _ERROR).write_text(reason.strip().partition("\n")[0] + "\n", encoding="utf-8")
        return 1
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    (folder / _RESULT).write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    return 0
