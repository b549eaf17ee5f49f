"""`make test` is the whole suite of the day, `make test-all` adds what is marked `nightly` and all cases of corpora.

Nothing is drawn: a test runs in every run of its name, or in none. The longest files come first, since workers take
whole files, and one of them would end alone with it.

PEFTCORE_SECONDS=600 says when a run must be done: tests that have not begun by then fail, and the last lines name their
files.

PEFTCORE_BUDGET=2 makes a test that takes more than 2 seconds fail, unless it is marked `slow`. The seconds are those of
the test's call on the processor, with its processes, so that other work on the machine does not count; a slower
processor gets more of them. A test that exceeds them runs a second time, since the first of a process pays for imports
and caches, and fails if it exceeds them again.
"""

from __future__ import annotations

import gc
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from _pytest.runner import runtestprotocol
from whole import WHOLE

# The same examples in every run, however slow the machine is.
hypothesis.settings.register_profile(
    "deterministic", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("deterministic")

ROOT = Path(__file__).parent
UNTIL = pytest.StashKey[float]()
FROZEN = pytest.StashKey[tuple[Path, int]]()
USED = pytest.StashKey[float]()
BUDGET = float(os.environ.get("PEFTCORE_BUDGET", "inf"))
TIME_IS_UP = "time is up (PEFTCORE_SECONDS): not run"
CONFORMANCE = "conformance.py"  # a file for each method, of 2 to 12 seconds
# Half a minute and more each, on a slow machine.
LONGEST = (
    "tests/card/test_card.py",
    "tests/csrc/test_sanitizers.py",
    "tests/emulator/test_lora_kernels.py",
    "tests/parallel/test_sharding.py",
    "tests/cli/training/test_parallel.py",
    "tests/cli/commands/test_train.py",
    "tests/emulator/test_linear_4bit_kernel.py",
    "tests/engine/test_lazy_logits.py",
    "tests/test_census.py",
    "tests/cli/commands/test_new_plugin.py",
)


def pytest_configure(config: pytest.Config) -> None:
    if "PEFTCORE_SECONDS" in os.environ:  # the same moment for all workers
        os.environ.setdefault("PEFTCORE_UNTIL", str(time.time() + float(os.environ["PEFTCORE_SECONDS"])))
        config.stash[UNTIL] = float(os.environ["PEFTCORE_UNTIL"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for name in ("PEFTCORE_SECONDS", "PEFTCORE_UNTIL", "PEFTCORE_BUDGET"):
        os.environ.pop(name, None)  # a run of pytest that a test starts is one of its own
    if not WHOLE:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("nightly")])
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]
    for item in items:
        if item.path.name.endswith(CONFORMANCE):
            item.add_marker("slow")
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    """Return 0 for the longest files, 1 for conformance, and 2 for the rest, so that short tests come last.

    A worker is given its next file while two tests of the one before are left: a few long tests in files of their own
    would keep one worker busy at the end, and leave the other without work.
    """
    if item.path.relative_to(ROOT).as_posix() in LONGEST:
        return 0
    return 1 if item.path.name.endswith(CONFORMANCE) else 2


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > item.config.stash.get(UNTIL, math.inf):
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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    began = _processor_seconds()
    yield
    item.stash[USED] = _processor_seconds() - began


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if math.isinf(BUDGET) or item.get_closest_marker("slow") or item.get_closest_marker("nightly"):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, log=False, nextitem=nextitem)
    if _exceeds_budget(item, reports):
        item._initrequest()  # type: ignore[attr-defined]  # fixtures are made again
        reports = runtestprotocol(item, log=False, nextitem=nextitem)
        if _exceeds_budget(item, reports):
            call = reports[1]
            call.outcome = "failed"
            call.longrepr = (
                f"{item.nodeid} took {item.stash[USED]:.1f} s of the processor, and {BUDGET:g} are allowed, times "
                f"{_slowness():.1f} for this machine. Make it faster, or mark it @pytest.mark.slow"
            )
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _exceeds_budget(item: pytest.Item, reports: list[pytest.TestReport]) -> bool:
    """Return whether a test that passed took longer than the budget."""
    used = item.stash.get(USED, 0.0)
    passed = all(report.passed for report in reports)
    return passed and used > BUDGET and used > BUDGET * _slowness()


def _processor_seconds() -> float:
    """Return the processor time of this process and of those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _slowness() -> float:
    """Return how many times longer Python takes at this moment than on a core of Zen 4 with other work, at least 1."""
    began, total = time.process_time(), 0
    for number in range(1_000_000):
        total += number & 3
    return max(1.0, (time.process_time() - began) / 0.06)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    late = [report for report in terminalreporter.stats.get("error", []) if TIME_IS_UP in str(report.longrepr)]
    for file, count in Counter(report.nodeid.partition("::")[0] for report in late).items():
        terminalreporter.write_line(f"not run for lack of time: {count} tests of {file}")
