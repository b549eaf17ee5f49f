"""One file of tests in ten runs with the kernels of plain C++: they stay right without AVX, and no test runs twice.

Which ones, the commit decides, so that all have their turn; the last line of a run names it, and

    PEFTCORE_PORTABLE=<what that line says> make test

repeats it. `all` takes every file, `none` no file.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
SHARE = 10
# They take every level already, and say at which one something fails, or run without the extension.
LEFT_OUT = ("tests/ops/", "tests/csrc/", "tests/fuzz/", "tests/emulator/")


def seed() -> str:
    """Of this run: the environment's, or the commit's."""
    git = ["git", "rev-parse", "--short=12", "HEAD"]
    if "PEFTCORE_PORTABLE" not in os.environ:
        done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
        os.environ["PEFTCORE_PORTABLE"] = done.stdout.strip() or "archive"  # for workers, too
    return os.environ["PEFTCORE_PORTABLE"]


def is_portable(file: str, seed: str) -> bool:
    """Whether this file of tests, by its path from here, runs at level portable."""
    if seed in ("all", "none") or file.startswith(LEFT_OUT):
        return seed == "all" and not file.startswith(LEFT_OUT)
    return int.from_bytes(hashlib.sha256(f"{seed} {file}".encode()).digest()[:4], "little") % SHARE == 0


def pytest_configure() -> None:
    seed()


@pytest.fixture(scope="module", autouse=True)
def portable(request: pytest.FixtureRequest) -> Iterator[None]:
    """The kernels of a file in the sample, and of the processes that it starts."""
    if not is_portable(request.path.relative_to(ROOT).as_posix(), seed()):
        yield
        return
    from levels import at_level

    with pytest.MonkeyPatch.context() as patch, at_level("portable"):
        patch.setenv("PEFTCORE_CPU_LEVEL", "portable")
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    failed = {report.nodeid.partition("::")[0] for report in terminalreporter.stats.get("failed", [])}
    portable = sorted(file for file in failed if is_portable(file, seed()))
    terminalreporter.write_line(f"files at level portable were chosen by PEFTCORE_PORTABLE={seed()}")
    for file in portable:
        terminalreporter.write_line(f"at level portable: {file}")
