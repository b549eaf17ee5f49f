"""What runs in `make test`, and what a run does that is late."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = """
import time

import pytest

def test_first():
    time.sleep(1.2)

def test_second():
    pass

@pytest.mark.nightly
def test_third():
    pass
"""


def outcome(folder: Path, **environment: str) -> tuple[int, str]:
    """The exit status and the output of a run of `TESTS` under the suite's own conftest.py."""
    (folder / "conftest.py").write_text((ROOT / "conftest.py").read_text())
    (folder / "test_it.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = nightly: of another run\n")
    of_this_run = ("PEFTCORE_TESTS", "PEFTCORE_LATE")
    inherited = {name: value for name, value in os.environ.items() if name not in of_this_run}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(folder)]
    environment = {**inherited, "PYTHONPATH": str(ROOT / "tests"), **environment}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout


@pytest.mark.slow
def test_nightly_tests_run_in_make_test_all_alone(tmp_path: Path) -> None:
    status, output = outcome(tmp_path)
    assert status == 0 and "2 passed, 1 deselected" in output
    status, output = outcome(tmp_path, PEFTCORE_TESTS="all")
    assert status == 0 and "3 passed" in output


@pytest.mark.slow
def test_what_has_not_begun_when_time_is_up_fails(tmp_path: Path) -> None:
    status, output = outcome(tmp_path, PEFTCORE_SECONDS="1")
    assert status == 1
    assert "1 passed, 1 deselected, 1 error" in output
    assert "not run for lack of time: 1 tests of test_it.py" in output
    status, output = outcome(tmp_path, PEFTCORE_SECONDS="1", PEFTCORE_LATE="skip")
    assert status == 0 and "1 passed, 1 skipped, 1 deselected" in output
    assert "not run for lack of time: 1 tests of test_it.py" in output
