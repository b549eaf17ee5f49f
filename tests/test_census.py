"""A sample of the census, another one each day: no crash and no wrong result that the last whole run did not know."""

from __future__ import annotations

import datetime
import random
from typing import Any

import pytest
from census import instances, report
from census.check import FIELDS
from census.worker import Worker

CLASSES = 8


def _unknown(rows: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    known = report.known()
    return {
        name: {method: why for method, why in methods.items() if method not in known.get(name, {})}
        for name, methods in report.failures(rows).items()
    }


@pytest.mark.slow
def test_a_sample_of_the_census() -> None:
    seed = datetime.date.today().toordinal()
    there = instances.classes()  # of this transformers
    names = random.Random(seed).sample([name for name in report.reached() if name in there], CLASSES)
    print(f"seed {seed}: {' '.join(names)}")  # shown if it fails; again: python -m census --only '^(…)$'
    worker = Worker(list(FIELDS), seconds=60)
    try:
        rows = [worker.examine(name) for name in names]
        suspects = [name for name, methods in _unknown(rows).items() if methods]
        again = [worker.examine(name) for name in suspects]  # a loaded machine may be late, not wrong
    finally:
        worker.close()
    assert not {name: methods for name, methods in _unknown(again).items() if methods}
    assert sum("none" not in row for row in rows) > CLASSES / 2


def test_a_class_that_ends_its_process_or_outlasts_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(["lora"], seconds=60)
    try:
        assert worker.examine("NoSuchModel")["none"].startswith("AttributeError")
        assert worker.examine("LlamaModel")["outcomes"]["lora"]["kind"] == "exact"
        worker._seconds = 0
        assert worker.examine("LlamaModel")["none"] == "instance: not done after 0 s"
        worker._seconds = 60
        assert worker.examine("GPT2Model")["outcomes"]["lora"]["kind"] == "exact"
        worker._process.kill()
        row = worker.examine("GPT2Model")
        assert row.get("none", "").startswith("instance: ")
        assert worker.examine("GPT2Model")["outcomes"]["lora"]["kind"] == "exact"
    finally:
        worker.close()


def test_every_class_has_a_model_type() -> None:
    found = instances.classes()
    assert len(found) > 1000
    assert found["LlamaForCausalLM"] == "llama"
    assert all(found.values())
