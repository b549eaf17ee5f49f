"""A task that is one module of a package: the titles of docs/plugin-hooks.md, registered through the hook."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from peftcore_cli.tasks.registered import find, tasks
from support.commands import WORDS, Run, write_jsonl
from support.imports import ROOT

import peftcore
from peftcore.plugin.registry import registry

PAGE = ROOT / "docs/plugin-hooks.md"


@pytest.fixture
def titles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    code = next(block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "Titles" in block)
    (tmp_path / "peftcore_titles.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    registry.register("titles", importlib.import_module("peftcore_titles"), "peftcore-titles", "1.0")
    yield
    registry.unregister("titles")


@pytest.mark.usefixtures("titles")
def test_it_trains_evaluates_and_predicts(run: Run, llama: Path, tmp_path: Path) -> None:
    bodies = [{"body": f"the {word} film", "title": f"a {word} story"} for word in WORDS]
    data, output = write_jsonl(tmp_path / "articles.jsonl", bodies), tmp_path / "run"
    method = ("--method", "lora", "--set", "r=8", "--lr", "0.02", "--steps", 60, "--batch-size", 16)
    run("train", "-m", llama, "-d", data, "-o", output, *method, "--holdout", 2, "--load-best", "--metric", "right")
    assert json.loads((output / "run.json").read_text())["task"] == "titles"
    assert json.loads((output / "adapter/peftcore_task.json").read_text())["task"] == "titles"
    after = json.loads((output / "result.json").read_text())["after"]
    assert after.keys() == {"loss", "right"} and after["loss"] < 2.0

    shown = run("eval", output, "-d", data).output
    assert "right" in shown and "19 examples" in shown
    asked = write_jsonl(tmp_path / "new.jsonl", [{"body": "the good film"}, {"body": "the dull film"}])
    answers = [
        json.loads(line) for line in run("predict", output, "-d", asked, "--answer-tokens", 4).output.splitlines()
    ]
    assert [each["body"] for each in answers] == ["the good film", "the dull film"]
    assert all(each["title"].startswith("a ") for each in answers)
    assert "peftcore predict" in run("train", "-m", llama, "-d", data, "-o", tmp_path / "other", *method).output


@pytest.mark.usefixtures("titles")
def test_what_its_class_says_holds_for_options(run: Run, llama: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "articles.jsonl", [{"body": "the film", "title": "a story"}] * 4)
    arguments = ("train", "-m", llama, "-d", data, "-o", tmp_path / "run", "--method", "lora", "--task", "titles")
    assert "--pack only works with causal-lm (the task is titles)" in run(*arguments, "--pack", code=1).output
    assert (
        "--metric must be one of loss, right for titles"
        in run(*arguments, "--metric", "left", "--load-best", code=1).output
    )
    wrong = write_jsonl(tmp_path / "wrong.jsonl", [{"text": "the film"}])
    refused = run("train", "-m", llama, "-d", wrong, "-o", tmp_path / "run", "--task", "titles", code=1).output
    assert "titles needs the keys body/title, found text" in refused and "--columns body=article" in refused
    assert "titles" in run("plugins").output.partition("tasks: ")[2]


def test_a_task_that_no_package_has() -> None:
    assert "titles" not in [task.name for task in tasks()]
    with pytest.raises(peftcore.PeftcoreError, match=r"--task must be one of causal-lm, .*grpo, found 'titles'"):
        find("titles")
