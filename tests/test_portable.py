"""The sample of files that run with the kernels of plain C++ (conftest.py) is a tenth, and all have their turn."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from levels import LEVELS

from peftcore import ops

ROOT = Path(__file__).parents[1]
FILES = [f"tests/{kind}/test_{i}.py" for kind in ("engine", "cli") for i in range(50)]


@pytest.fixture
def sample(request: pytest.FixtureRequest) -> Any:
    (conftest,) = (p for p in request.config.pluginmanager.get_plugins() if getattr(p, "SHARE", None) == 10)
    return conftest


def test_a_tenth_of_the_files_by_the_seed(sample: Any) -> None:
    chosen = [{file for file in FILES if sample.is_portable(file, f"commit {i}")} for i in range(100)]
    assert 8 < sum(map(len, chosen)) / 100 < 12
    assert set.union(*chosen) == set(FILES)
    assert chosen[0] == {file for file in FILES if sample.is_portable(file, "commit 0")}
    assert not any(sample.is_portable(file, "none") for file in FILES)
    assert all(sample.is_portable(file, "all") for file in FILES)
    assert not sample.is_portable("tests/ops/test_lora.py", "all")  # which takes all levels itself


def test_this_file_runs_where_the_sample_says(sample: Any) -> None:
    if ops.extension is None:
        pytest.skip("no levels without the extension")
    chosen = sample.is_portable("tests/test_portable.py", sample.seed())
    assert ops.extension.cpu_level() == ("portable" if chosen else os.environ.get("PEFTCORE_CPU_LEVEL", LEVELS[-1]))


BOUNDED = """
import time

def test_first():
    time.sleep(1.2)

def test_second():
    raise AssertionError("it starts after the time is up")
"""


def test_where_the_time_is_bounded_no_test_starts_after_it(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(BOUNDED)
    bounded = {"PEFTCORE_SECONDS": "1", "PEFTCORE_PORTABLE": "none", "PYTHONPATH": str(ROOT / "tests")}
    environment = {**os.environ, **bounded}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "1 passed, 1 skipped" in done.stdout
    assert "1 tests were left to other commits: time is up" in done.stdout


def test_the_order_of_a_bounded_run_is_the_commits(sample: Any) -> None:
    orders = {tuple(sorted(FILES, key=lambda file: sample.number(file, f"commit {i} order"))) for i in range(5)}
    assert len(orders) == 5
