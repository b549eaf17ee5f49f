"""One file of tests in ten runs with the kernels of plain C++: they stay right without AVX, and no test runs twice.

Which ones, the commit decides, so that all have their turn; the last line of a run names it, and

    PEFTCORE_PORTABLE=<what that line says> make test

repeats it. `all` takes every file, `none` no file.

PEFTCORE_SECONDS=600 bounds a run on a slow machine: files come in an order that the commit decides, after 600 seconds
no further test starts, and those that are left are skipped; the last lines say how many.

In a run of all tests one method in three goes through the conformance suite, again by the commit; with
PEFTCORE_FUZZ=all, or where its file is named, each does.
"""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from one_in_three import has_its_turn

ROOT = Path(__file__).parent
SHARE = 10
UNTIL = pytest.StashKey[float]()
WHOLE = pytest.StashKey[bool]()
ALL_TESTS = "PEFTCORE_ALL_TESTS"
TIME_IS_UP = "time is up (PEFTCORE_SECONDS); it has its turn at another commit"
# Minutes each, on a slow machine.
LONGEST = (
    "tests/csrc/test_sanitizers.py",
    "tests/emulator/test_lora_kernels.py",
    "tests/parallel/test_state.py",
    "tests/test_census.py",
    "tests/cli/commands/test_new_plugin.py",
)
# They take every level already, and say at which one something fails, or run without the extension.
LEFT_OUT = ("tests/ops/", "tests/csrc/", "tests/fuzz/", "tests/emulator/")


def seed() -> str:
    """Of this run: the environment's, or the commit's."""
    git = ["git", "rev-parse", "--short=12", "HEAD"]
    if "PEFTCORE_PORTABLE" not in os.environ:
        done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
        os.environ["PEFTCORE_PORTABLE"] = done.stdout.strip() or "archive"  # for workers, too
    return os.environ["PEFTCORE_PORTABLE"]


def number(file: str, seed: str) -> int:
    """Of a file of tests, by its path from here: what a run does with it."""
    return int.from_bytes(hashlib.sha256(f"{seed} {file}".encode()).digest()[:4], "little")


def is_portable(file: str, seed: str) -> bool:
    """Whether this file of tests runs at level portable."""
    if seed in ("all", "none") or file.startswith(LEFT_OUT):
        return seed == "all" and not file.startswith(LEFT_OUT)
    return number(file, seed) % SHARE == 0


def is_conformance(file: str) -> bool:
    return file.startswith("plugins/") and "conformance" in Path(file).name


def pytest_configure(config: pytest.Config) -> None:
    seed()
    if "PEFTCORE_SECONDS" in os.environ:  # the same moment for all workers
        os.environ.setdefault("PEFTCORE_UNTIL", str(time.time() + float(os.environ["PEFTCORE_SECONDS"])))
        config.stash[UNTIL] = float(os.environ["PEFTCORE_UNTIL"])
    if config.args_source == pytest.Config.ArgsSource.TESTPATHS:
        os.environ[ALL_TESTS] = "1"  # for workers, too, which are not told
    config.stash[WHOLE] = ALL_TESTS in os.environ


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files come first: workers take whole files, and one of them would end alone with it.

    Where the time is bounded the others come in the commit's order."""
    for name in ("PEFTCORE_SECONDS", "PEFTCORE_UNTIL", ALL_TESTS):
        os.environ.pop(name, None)  # a run of pytest that a test starts is one of its own
    files = {item.path.relative_to(ROOT).as_posix() for item in items}
    bounded = UNTIL in config.stash
    place = {file: (file not in LONGEST, bounded and number(file, f"{seed()} order")) for file in files}
    items.sort(key=lambda item: place[item.path.relative_to(ROOT).as_posix()])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > item.config.stash.get(UNTIL, math.inf):
        pytest.skip(TIME_IS_UP)
    file = item.path.relative_to(ROOT).as_posix()
    if item.config.stash[WHOLE] and is_conformance(file) and not has_its_turn(file):
        pytest.skip("has its turn at another commit, or with PEFTCORE_FUZZ=all")


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
    left = sum(TIME_IS_UP in str(report.longrepr) for report in terminalreporter.stats.get("skipped", []))
    if left:
        terminalreporter.write_line(f"{left} tests were left to other commits: {TIME_IS_UP}")
    terminalreporter.write_line(f"files at level portable were chosen by PEFTCORE_PORTABLE={seed()}")
    for file in portable:
        terminalreporter.write_line(f"at level portable: {file}")
