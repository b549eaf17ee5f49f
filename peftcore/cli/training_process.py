"""One training run in a process of its own, so that its peak memory is its own and its failure no one else's.

FOLDER/run.json       the settings; run.toml as options
FOLDER/log.txt        what it printed
FOLDER/result.json    what it found, or
FOLDER/error.txt      why it found nothing
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peftcore.cli.options import FULL
from peftcore.cli.settings import RUN_FILE, Settings, prepare_folder, write_options
from peftcore.errors import PeftcoreError

_RESULT, _ERROR = "result.json", "error.txt"
STOPPED = 130


def run(folder: Path, settings: Settings, show: Callable[[str], None]) -> dict[str, Any]:
    """The result of a run, as `training.Result.to_json` has it, or {"error": why there is none}.

    A finished run is kept, one that was cut off goes on from its checkpoint. `show` gets each line that it prints.

    Raises:
        PeftcoreError: a run with other settings lies there.
        KeyboardInterrupt: Ctrl-C; the run has stopped, with a checkpoint.
    """
    prepare_folder(folder, settings, resume=True, overwrite=False)
    if settings.method != FULL:  # which `train` does not know
        write_options(folder, settings, {})
    if not (folder / _RESULT).exists():
        status = run_child(folder, show)
        if status == STOPPED:
            raise KeyboardInterrupt
        if status != 0:
            return {"error": _failure(folder, status)}
    return json.loads((folder / _RESULT).read_text(encoding="utf-8"))


def run_child(folder: Path, show: Callable[[str], None]) -> int:
    command = [sys.executable, "-u", "-m", __name__, str(folder)]
    with (
        open(folder / "log.txt", "a", 1, encoding="utf-8") as log,
        # In a session of its own: Ctrl-C is for this process, which asks the run for an orderly stop.
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        ) as child,
    ):
        assert child.stdout is not None  # it is a pipe
        stopping = False
        while True:
            try:
                for line in child.stdout:
                    log.write(line)
                    show(line.strip())
                status = child.wait()
                return STOPPED if stopping else status
            except KeyboardInterrupt:
                if stopping:
                    child.kill()
                    raise
                stopping = True
                child.send_signal(signal.SIGTERM)


def _failure(folder: Path, status: int) -> str:
    if (folder / _ERROR).exists():
        return (folder / _ERROR).read_text(encoding="utf-8").strip()
    if status == -signal.SIGKILL:
        return "it was killed: the memory did not suffice, or someone did it"
    last = (folder / "log.txt").read_text(encoding="utf-8").strip().rpartition("\n")[2]
    return f"it ended with status {status}: {last}"


def main(folder: Path) -> int:
    """Train as `folder` says; the exit status."""
    from peftcore.cli import training

    settings = Settings(**json.loads((folder / RUN_FILE).read_text(encoding="utf-8")))
    (folder / _ERROR).unlink(missing_ok=True)
    try:
        result = training.run(settings, folder, resume=(folder / "checkpoints").is_dir())
    except training.Stopped:
        return STOPPED
    except Exception as error:
        reason = str(error) if isinstance(error, PeftcoreError) else f"{type(error).__name__}: {error}"
        (folder / _ERROR).write_text(reason.strip().partition("\n")[0] + "\n", encoding="utf-8")
        return 1
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    (folder / _RESULT).write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
