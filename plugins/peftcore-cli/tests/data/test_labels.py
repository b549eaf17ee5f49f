"""Labels of files: names, numbers, lists of names; and what is none of them, by file and line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from peftcore_cli.bases.adapter_folders import AdapterTask
from peftcore_cli.data import row_reading
from peftcore_cli.tasks import row_labels
from peftcore_cli.tasks.registered import find
from support.commands import Run, write_jsonl

from peftcore import PeftcoreError


def file_of(folder: Path, *labels: Any, name: str = "label") -> Path:
    return write_jsonl(folder / "rows.jsonl", [{"text": "a", name: label} for label in labels])


@pytest.mark.parametrize(
    ("labels", "task", "read"),
    [
        ((1, "b"), "classification", ["1", "b"]),
        (("good ", "good", " bad"), "classification", ["good", "good", "bad"]),
        ((1, 2), "classification", ["1", "2"]),
        ((1, 2.5, "-3e1"), "regression", [1.0, 2.5, -30.0]),
        (("1.0", "2.0"), "classification", ["1.0", "2.0"]),
        (("1.5", "two"), "classification", ["1.5", "two"]),
        ((["a", 2], [], '["b"]'), "multi-label", [("a", "2"), (), ("b",)]),
    ],
)
def test_the_task_is_read_off_all_labels(tmp_path: Path, labels: tuple[Any, ...], task: str, read: list[Any]) -> None:
    path = file_of(tmp_path, *labels)
    assert row_reading.guess_task(path) == task
    assert [row.label for row in row_reading.read_rows(path, task)] == read


@pytest.mark.parametrize(
    ("task", "label", "message"),
    [
        ("classification", 2.5, "'label' must be text, found 2.5"),
        ("classification", "NaN", "'label' is NaN, which usually stands for a missing value"),
        ("regression", "high", "'label' must be a number, found \"high\""),
        ("regression", True, "'label' must be a number, found true"),
        ("regression", float("nan"), "'label' must be a number, found NaN"),
        ("regression", 10**400, "'label' must be a number, found 1000"),
        ("multi-label", "a,b", "'label' must be a list of names"),
        ("multi-label", '["a"', "'label' must be a list of names"),
        ("multi-label", [0.0, 1.0], "'label' must be a list of names"),
        ("multi-label", [True, False], "'label' must be a list of names"),
        (
            "multi-label",
            [0, 1, 1],
            "'label' names 1 twice: [0, 1, 1]. List only the labels that apply, instead of a zero",
        ),
        ("multi-label", ["a", " "], "'label' must be a list of names"),
        ("multi-label", ["a", " nan"], "'label' is nan, which usually stands for a missing value"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, task: str, label: Any, message: str) -> None:
    good = {"classification": "a", "regression": 1.5, "multi-label": ["a"]}[task]
    path = file_of(tmp_path, good, label)
    with pytest.raises(PeftcoreError) as error:
        row_reading.read_rows(path, task)
    assert str(error.value).startswith(f"{path}:2: {message}")


def test_targets(tmp_path: Path) -> None:
    rows = row_reading.read_rows(file_of(tmp_path, ["b", "a"], [], ["c"], name="labels"), "multi-label")
    assert row_labels.labels_of(rows) == ["a", "b", "c"]
    assert row_labels.targets(rows, ["a", "b", "c"]) == [(1.0, 1.0, 0.0), (0.0, 0.0, 0.0), (0.0, 0.0, 1.0)]
    with pytest.raises(PeftcoreError, match=r":3: unknown label 'c'"):
        row_labels.targets(rows, ["a", "b"])
    rows = row_reading.read_rows(file_of(tmp_path, 1.5, 2), "regression")
    assert row_labels.labels_of(rows) == [] and row_labels.targets(rows, []) == [1.5, 2.0]
    with pytest.raises(PeftcoreError, match=r":1: no example has a label"):
        row_labels.labels_of(row_reading.read_rows(file_of(tmp_path, [], []), "multi-label"))


METHOD = ("--method", "lora", "--set", "r=4", "--lr", "0.02", "--steps", 40, "--batch-size", 4, "--save-every", 40)


@pytest.mark.parametrize("task", ["classification", "multi-label", "tags"])
def test_questions_for_labels_that_no_file_may_have(task: str) -> None:
    """Labels of another library's adapter: training data may not contain `nan`, or spaces around a name."""
    about = AdapterTask(task, 16, (" nan", "very good "))
    row = find(task).read_question("file:1", {"text": "the film", "tokens": ["the", "film"]}, about)
    assert row.text == "the film"
    assert row.label in (" nan", (" nan",), (" nan", " nan"))


def rows_of(labelled: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in labelled.read_text().splitlines()]


def trained(run: Run, bert: Path, path: Path, *more: Any) -> dict[str, Any]:
    output = path.parent / "run"
    run("train", "-m", bert, "-d", path, "--eval-data", path, "-o", output, *METHOD, *more)
    return json.loads((output / "result.json").read_text())


def test_regression_end_to_end(run: Run, bert: Path, labelled: Path, tmp_path: Path) -> None:
    values = {"up": 1.5, "down": -1.5}
    rows = [{"text": row["text"], "label": values[row["label"]]} for row in rows_of(labelled)]
    found = trained(run, bert, write_jsonl(tmp_path / "rated.jsonl", rows), "--dtype", "bf16")
    assert found["baseline"] == ["loss of the mean", 2.25] and found["after"]["loss"] < 0.5
    assert found["after"]["pearson"] > 0.9 and "loss of the mean" in (tmp_path / "run" / "report.html").read_text()
    answer = float(run("generate", tmp_path / "run", "-p", "the story is good").output)
    assert answer == pytest.approx(1.5, abs=0.7)
    shown = run("eval", tmp_path / "run", "-d", tmp_path / "rated.jsonl").output
    assert "spearman" in shown and "2.2500" in shown
    run("merge", tmp_path / "run", "-o", tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["problem_type"] == "regression" and list(config["id2label"]) == ["0"]


def test_several_labels_end_to_end(run: Run, bert: Path, labelled: Path, tmp_path: Path) -> None:
    rows = [
        {"text": row["text"], "labels": [row["label"], *(["past"] if "was" in row["text"] else [])]}
        for row in rows_of(labelled)
    ]
    found = trained(run, bert, write_jsonl(tmp_path / "many.jsonl", rows), "--steps", 60)
    assert found["labels"] == ["down", "past", "up"] and found["confusion"] is None
    assert found["after"]["micro_f1"] > 0.9 and found["after"]["exact_match"] > 0.8
    answer = run("generate", tmp_path / "run", "-p", "the story was good").output
    assert "up (" in answer and "past (" in answer and "down (" not in answer
    assert "macro F1" in run("eval", tmp_path / "run", "-d", tmp_path / "many.jsonl").output


def test_batches_that_make_one_step_weigh_as_one_batch(run: Run, bert: Path, labelled: Path, tmp_path: Path) -> None:
    """The gradient of two halves is that of the whole; Trainer adds up means of losses that a model does not scale."""
    still = tmp_path / "still"
    shutil.copytree(bert, still)
    config = json.loads((still / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (still / "config.json").write_text(json.dumps(config))
    norms = []
    for size, accumulated in ((16, 1), (8, 2)):
        output = tmp_path / str(size)
        sizes = ("--batch-size", size, "--grad-accum", accumulated, "--eval-data", labelled)
        run("train", "-m", still, "-d", labelled, "-o", output, *sizes, "--method", "lora", "--steps", 1)
        state = json.loads((output / "checkpoints" / "checkpoint-1" / "trainer_state.json").read_text())
        norms.append(state["log_history"][0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.parametrize(
    ("task", "labels", "said"),
    [
        ("classification", ("good", "bad", "good ", "good"), "good (3), bad (1). 75.0% of the examples"),
        ("multi-label", (["old", "good"], ["good"], [], []), "good (2), old (1). 50.0% of the examples"),
    ],
)
def test_counts_of_labels_are_described(tmp_path: Path, task: str, labels: tuple[Any, ...], said: str) -> None:
    rows = row_reading.read_rows(file_of(tmp_path, *labels), task)
    assert row_labels.counts_of(rows) == f"labels: {said} have the most frequent label"


def test_numbers_have_no_counts(tmp_path: Path) -> None:
    assert row_labels.counts_of(row_reading.read_rows(file_of(tmp_path, 1.0, 2.5), "regression")) == ""
