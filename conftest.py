"""`make test` is the whole suite of the day, `make test-all` adds what is marked `nightly` and all cases of corpora.

Nothing is drawn: a test runs in every run of its name, or in none. The longest files come first, since workers take
whole files, and one of them would end alone with it.

PEFTCORE_SECONDS=600 says when a run must be done: tests that have not begun by then fail, and the last lines name their
files. With PEFTCORE_LATE=skip they are skipped, and named as well.
"""

from __future__ import annotations

import gc
import math
import os
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from whole import WHOLE

ROOT = Path(__file__).parent
UNTIL = pytest.StashKey[float]()
FROZEN = pytest.StashKey[tuple[Path, int]]()
TIME_IS_UP = "time is up (PEFTCORE_SECONDS): not run"
# A minute and more each, on a slow machine.
LONGEST = (
    "tests/csrc/test_sanitizers.py",
    "tests/emulator/test_lora_kernels.py",
    "tests/parallel/test_state.py",
    "tests/test_census.py",
    "tests/cli/commands/test_new_plugin.py",
)


def pytest_configure(config: pytest.Config) -> None:
    if "PEFTCORE_SECONDS" in os.environ:  # the same moment for all workers
        os.environ.setdefault("PEFTCORE_UNTIL", str(time.time() + float(os.environ["PEFTCORE_SECONDS"])))
        config.stash[UNTIL] = float(os.environ["PEFTCORE_UNTIL"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for name in ("PEFTCORE_SECONDS", "PEFTCORE_UNTIL"):
        os.environ.pop(name, None)  # a run of pytest that a test starts is one of its own
    if not WHOLE:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("nightly")])
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]
    items.sort(key=lambda item: item.path.relative_to(ROOT).as_posix() not in LONGEST)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > item.config.stash.get(UNTIL, math.inf):
        if os.environ.get("PEFTCORE_LATE") == "skip":
            pytest.skip(TIME_IS_UP)
        pytest.fail(TIME_IS_UP, pytrace=False)
    _freeze(item)


def _freeze(item: pytest.Item) -> None:
    """Leave what is alive out of later garbage collections: for each file, and where many modules were imported.

    A collection that walks PyTorch and transformers takes 0.3 s, and accelerate asks for one in every training.
    """
    path, modules = item.config.stash.get(FROZEN, (None, 0))
    if path != item.path or len(sys.modules) > modules + 50:
        gc.collect()
        gc.freeze()
        item.config.stash[FROZEN] = item.path, len(sys.modules)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    stats = terminalreporter.stats
    late = [r for r in (*stats.get("error", []), *stats.get("skipped", [])) if TIME_IS_UP in str(r.longrepr)]
    for file, count in Counter(report.nodeid.partition("::")[0] for report in late).items():
        terminalreporter.write_line(f"not run for lack of time: {count} tests of {file}")
