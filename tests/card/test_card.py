"""`benchmarks/card.py` on the emulator's build, and with cases that fail, crash and hang."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from emulator import building
from support.whole_run import WHOLE

from card.table import all_cases

ROOT = Path(__file__).resolve().parents[2]
MOST = None if WHOLE else 12  # cases of each function: enough for each kernel that `docs/card.md` lists


def card(out: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "benchmarks" / "card.py"), "--out", str(out), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=out)


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.json").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if building.compiler() is None:
        pytest.skip("no g++")
    out = tmp_path_factory.mktemp("card")
    done = card(
        out, "--emulator", "--seconds", "3600", "--patience", "120", *([] if MOST is None else ["--most", str(MOST)])
    )
    log = out / "correctness.log"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text() if log.exists() else "")
    return out


def test_every_case_of_the_emulator_passes_and_is_reported(run: Path) -> None:
    found = {row["name"]: row for row in rows(run) if row["stage"] == "correctness"}
    emulated = [case for case in all_cases() if case.emulated]
    by_function = [[case.name for case in emulated if case.function == name] for name in {c.function for c in emulated}]
    assert set(found) == {name for names in by_function for name in names[:MOST]}
    assert [name for name, row in found.items() if row["status"] != "passed"] == []
    report = (run / "report.md").read_text()
    assert "**every check passed** (exit code 0)" in report
    assert "| correctness: lora_linear |" in report


def test_failures_crashes_and_hangs_are_rows_and_the_rest_runs(tmp_path: Path) -> None:
    archive = tmp_path / "results.tgz"
    options = ["--emulator", "--table", "card.faulty", "--patience", "5", "--only", "correctness"]
    options += ["--pack", str(archive), "--commit", "the commit"]
    done = card(tmp_path, *options, "--seconds", "0")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "the time was up" in (tmp_path / "report.md").read_text() and rows(tmp_path) == []
    done = card(tmp_path, *options)
    assert done.returncode == 2 and "Continue with --resume" in done.stderr
    resumed = [*options, "--resume", str(tmp_path / "results.json")]
    done = card(tmp_path, *resumed)
    assert done.returncode == 1, done.stdout + done.stderr
    found = {row["name"]: (row["status"], row["detail"]) for row in rows(tmp_path)}
    assert found["passes"] == found["ends_its_process"] == ("passed", "fine")
    assert found["skips"] == ("skipped", "not here")
    assert found["fails"] == ("failed", "AssertionError: wrong")
    assert found["crashes"] == ("failed", "the process ended with code 9")
    assert found["hangs"] == ("failed", "no end within 5 seconds")
    assert found["breaks_the_card"][0] == "failed" and found["comes_last"][0] == "passed"
    assert "crashes_again[1]" in found and "crashes_again[2]" not in found  # after two faults
    report = (tmp_path / "report.md").read_text()
    assert "| commit | the commit |" in report
    with tarfile.open(archive) as packed:
        assert {Path(name).name for name in packed.getnames()} >= {"results.json", "report.md", "correctness.log"}
    assert "**checks failed** (exit code 1)" in report and "- correctness, `crashes`: the process ended" in report
    before = rows(tmp_path)
    assert card(tmp_path, *resumed).returncode == 1
    assert [row["name"] for row in rows(tmp_path)[len(before) :]] == ["skips"]  # nothing else runs again


def test_the_first_cases_are_one_of_each_function_and_slow_ones_come_last() -> None:
    cases = all_cases()
    quick = [case for case in cases if not case.slow]
    functions = {case.function for case in quick}
    assert {case.function for case in quick[: len(functions)]} == functions
    assert cases[: len(quick)] == quick
