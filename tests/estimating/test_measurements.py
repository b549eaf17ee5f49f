"""Measurements of a machine: taken once, read from the file afterwards."""

import json
from pathlib import Path

import pytest

from peftcore.estimating import measurements
from peftcore.estimating.measurements import Measurement


def test_measures_once_for_each_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    taken: list[int] = []

    def measure() -> list[int]:
        taken.append(len(taken))
        return [*taken]

    kernels = "avx2 one"
    measurement = Measurement("any.json", list, measure, list, lambda: kernels)
    assert [measurement.get(), measurement.get()] == [[0], [0]]
    kernels = "avx2 other"
    assert measurement.get() == [0, 1]
    assert len(json.loads((tmp_path / "peftcore/any.json").read_text())) == 2
    (tmp_path / "peftcore/any.json").write_text("[")
    assert measurement.get() == [0, 1, 2]
    assert measurement.measured_again() == [0, 1, 2, 3] == measurement.get()


def test_instruction_sets_and_threads_are_part_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    before = measurements.machine()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")
    assert measurements.machine() != before and "ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI" in measurements.machine()
