"""A part of the census: no crash and no wrong result that the last whole run did not know."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from census import __main__ as census, instances, report
from census.check import FIELDS
from census.worker import Worker
from support.whole_run import WHOLE

# Text with images, recurrence, experts; an encoder, a decoder, an encoder and decoder.
OF_EACH_KIND = ("CLIPModel", "MambaForCausalLM", "MixtralForCausalLM")
IN_CONFORMANCE = ("BertForSequenceClassification", "LlamaForCausalLM", "T5ForConditionalGeneration")
MORE = 64  # in `make test-all`


def _unknown(rows: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    known = report.known()
    return {
        name: {method: why for method, why in methods.items() if method not in known.get(name, {})}
        for name, methods in report.failures(rows).items()
    }


def _examine(names: Sequence[str]) -> None:
    """Fail with what is unknown of these classes. Again, one by one: python -m census --only '^(…)$'"""
    worker = Worker(list(FIELDS), seconds=60)
    try:
        rows = [worker.examine(name) for name in names]
        suspects = [name for name, methods in _unknown(rows).items() if methods]
        again = [worker.examine(name) for name in suspects]  # a loaded machine may be late, not wrong
    finally:
        worker.close()
    assert not {name: methods for name, methods in _unknown(again).items() if methods}
    assert sum("none" not in row for row in rows) > len(names) / 2


def test_a_class_of_each_kind() -> None:
    """Families that every method's conformance tries run in `make test-all`."""
    names = (*OF_EACH_KIND, *(IN_CONFORMANCE if WHOLE else ()))
    assert set(names) <= set(report.reached())
    _examine(names)


@pytest.mark.nightly
def test_many_classes() -> None:
    there = instances.classes()  # of this transformers
    _examine(random.Random(0).sample([name for name in report.reached() if name in there], MORE))


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


def test_page_names_versions_and_commits() -> None:
    rows: list[dict[str, Any]] = [
        {"class": "A", "outcomes": {}, "commit": "1234567", "transformers": "5.24.0"},
        {"class": "B", "outcomes": {}, "commit": "1234567", "transformers": "5.24.0"},
        {"class": "C", "outcomes": {}, "commit": "1234567-dirty"},
    ]
    assert (
        "\nMade by `make census`. Versions of transformers: 5.24.0 (2 classes), not recorded (1 class). "
        "Commits: 1234567 (2 classes), 1234567 with uncommitted changes (1 class).\n"
    ) in report.markdown([row | {"none": "no instance"} for row in rows])


def test_a_part_does_not_replace_the_page_of_all(tmp_path: Path, monkeypatch, capsys) -> None:
    page, rows, known = tmp_path / "census.md", tmp_path / "rows.jsonl", tmp_path / "known.json"
    monkeypatch.setattr(report, "KNOWN", known)
    monkeypatch.setattr(census, "classes", lambda: {"AModel": "a", "BModel": "b"})
    arguments = ["census", "--only", "^$", "--rows", str(rows), "--write", str(page)]
    monkeypatch.setattr(sys, "argv", arguments)
    rows.write_text('{"class": "AModel", "outcomes": {}, "none": "no instance"}\n')
    census.main()
    assert not page.exists() and not known.exists()
    assert f"{page} stays as it is: 1 of 2 classes have rows." in capsys.readouterr().out
    with rows.open("a") as file:
        file.write('{"class": "BModel", "outcomes": {}, "none": "no instance"}\n')
        file.write('{"class": "OfAnotherVersion", "outcomes": {}, "none": "no instance"}\n')
    census.main()
    assert "| classes listed | 2 |" in page.read_text()
    assert report.reached() == []
