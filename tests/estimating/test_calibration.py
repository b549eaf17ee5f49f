"""Overhead of this machine: measured once, or the largest values seen where nothing can be measured."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peftcore.estimating import calibration
from peftcore.estimating.overhead import LARGEST_SEEN, Overhead

MADE = Overhead(500, 20, {"bfloat16": 40}, {"bfloat16 xtw": 4.0}, 0.25)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calibration.here.cache_clear()
    monkeypatch.setattr(calibration, "here", calibration.here.__wrapped__)
    return tmp_path / "peftcore/overhead.json"


def test_is_measured_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def run(command: list[str], **_: Any) -> Any:
        runs.append(command[1:])
        return subprocess.CompletedProcess([], 0, b"a warning\n" + json.dumps(MADE._asdict()).encode())

    monkeypatch.setattr(subprocess, "run", run)
    assert calibration.here(1) == MADE == calibration.here(1)
    assert (
        runs == [["-c", "from peftcore.estimating.calibration import main; main()"]]
        and len(json.loads(fresh.read_text())) == 1
    )
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    calibration.here(1)
    assert len(runs) == 2, "another allocator is measured again"


@pytest.mark.parametrize("printed", [b"", b"[]", b'{"libraries": 5}', b"Traceback"])
def test_the_largest_values_are_taken_where_nothing_can_be_measured(
    printed: bytes, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, printed))
    assert calibration.here(1) is LARGEST_SEEN and not fresh.exists()


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="the peak comes from /proc/self/status")
def test_values_of_this_machine(fresh: Path) -> None:
    found = calibration.here(1)
    assert fresh.exists() and 1e8 < found.libraries < 1e9 and found.first_step < 0.3 * found.libraries
    assert 0.0 <= found.allowance < 1.0 and all(0 <= each < 1 << 20 for each in found.code.values())
