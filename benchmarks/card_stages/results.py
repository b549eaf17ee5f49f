"""The file of results: one JSON object per line, written before the next job begins."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PASSED, FAILED, SKIPPED, MEASURED = "passed", "failed", "skipped", "measured"
PROVING = ("build", "correctness", "tools")  # stages that the exit code depends on
START_AGAIN = 77  # exit code of a process after an error that leaves the GPU unusable for it
TIME_WAS_UP = "the time was up"


class Results:
    """Rows of a run. A row has `stage`, `name`, `status`, `seconds`, and fields of the stage."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the last row of each stage and name, skipping an incomplete line of an interrupted run."""
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            rows[row["stage"], row["name"]] = row
        yield from rows.values()

    def names(self, stage: str) -> set[str]:
        """Return the names of a stage's rows that need not run again, which are all except skipped ones."""
        return {row["name"] for row in self if row["stage"] == stage and row["status"] != SKIPPED}

    def add(self, stage: str, name: str, status: str, seconds: float = 0.0, **fields: Any) -> dict[str, Any]:
        row = {"stage": stage, "name": name, "status": status, "seconds": round(seconds, 3), **fields}
        line = json.dumps(row)
        if self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n"):
            line = "\n" + line  # after an incomplete line of an interrupted run
        with self.path.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        return row
