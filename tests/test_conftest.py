"""What runs in `make test`, and what a run does that is late or has a test over the budget."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NIGHTLY = """
import pytest

def test_first():
    pass

def test_second():
    pass

@pytest.mark.nightly
def test_third():
    pass
"""
OVER = """
import pytest

CALLS = []

def work():
    return sum(number & 3 for number in range(6_000_000))

def test_first_call():
    CALLS.append(0)
    if len(CALLS) == 1:
        work()

def test_each_call():
    work()

@pytest.mark.slow
def test_marked():
    work()

@pytest.fixture(scope="module")
def shared():
    return work()

def test_fixture(shared):
    pass

@pytest.mark.nightly
def test_nightly():
    pass
"""


def outcome(folder: Path, tests: str, **environment: str) -> tuple[int, str]:
    """Return the exit status and the output of a run of `tests` under the suite's own conftest.py."""
    (folder / "conftest.py").write_text((ROOT / "conftest.py").read_text())
    (folder / "test_it.py").write_text(tests)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n nightly: of another run\n slow: over the budget\n")
    inherited = {name: value for name, value in os.environ.items() if name != "PEFTCORE_TESTS"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(folder)]
    environment = {**inherited, "PYTHONPATH": str(ROOT / "tests"), **environment}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout


@pytest.mark.slow
def test_what_has_not_begun_when_time_is_up_fails(tmp_path: Path) -> None:
    status, output = outcome(tmp_path, NIGHTLY, PEFTCORE_SECONDS="0")
    assert status == 1
    assert "1 deselected, 2 errors" in output
    assert "not run for lack of time: 2 tests of test_it.py" in output


@pytest.mark.slow
def test_a_test_over_the_budget_fails_unless_it_is_marked(tmp_path: Path) -> None:
    """One that takes long the first time only, or whose shared fixture does, passes; nightly tests are left out."""
    status, output = outcome(tmp_path, OVER, PEFTCORE_BUDGET="0.1")
    assert status == 1 and "1 failed, 3 passed, 1 deselected" in output, output
    assert "test_each_call took" in output and "or mark it @pytest.mark.slow" in output


@pytest.mark.slow
def test_without_a_budget_all_pass_and_make_test_all_runs_the_nightly_ones(tmp_path: Path) -> None:
    status, output = outcome(tmp_path, OVER, PEFTCORE_TESTS="all")
    assert status == 0 and "5 passed" in output
