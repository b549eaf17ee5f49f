"""Options and fields by the names of other programs, and folders that are not what an option takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from peftcore_cli import signatures, synonyms
from peftcore_cli.commands.train import train
from support.commands import Run, write_jsonl

import peftcore


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--learning-rate", "--lr"),
        ("--num_train_epochs", "--epochs"),
        ("--max-seq-length", "--max-length"),
        ("--lora-r", "--set NAME=VALUE"),
        ("--early-stopping-patience", "--patience"),
    ],
)
def test_an_option_of_another_program(run: Run, option: str, meant: str) -> None:
    output = run("train", option, "1", "-d", "data.jsonl", "-o", "run", code=2).output
    assert f"No such option: {option}. Did you mean {meant}?" in " ".join(output.split())


def test_an_option_that_the_command_does_not_have(run: Run) -> None:
    output = run("merge", "--learning-rate", 1, code=2).output
    assert "No such option: --learning-rate" in output and "Did you mean" not in output


def test_every_suggestion_is_an_option_of_train() -> None:
    app = typer.Typer()
    app.command()(signatures.expand(train))
    options = {option for each in typer.main.get_command(app).params for option in each.opts}
    assert {f"--{name}" for name in synonyms.OPTIONS.values()} <= options


def test_a_folder_without_a_model(run: Run, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "texts.jsonl", [{"text": "good"}, {"text": "bad"}])
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "notes.txt").write_text("")
    arguments = ("-d", data, "--method", "lora", "-o", tmp_path / "run")
    output = run("train", "-m", tmp_path / "odd", *arguments, code=1).output
    assert "has no config.json, so it is not a model, found notes.txt." in " ".join(output.split())
    (tmp_path / "odd" / "adapter_config.json").write_text("{}")
    output = run("train", "-m", tmp_path / "odd", *arguments, code=1).output
    assert "is an adapter. Pass its base as --model, and the adapter as" in " ".join(output.split())


@pytest.mark.parametrize("command", ["chat", "eval", "export", "generate", "info", "merge", "predict"])
def test_the_adapter_is_an_argument(run: Run, command: str) -> None:
    output = run(command, "--adapter", "run", code=2).output
    assert f"The adapter is an argument: peftcore {command} ADAPTER" in " ".join(output.replace("│", " ").split())


def test_suggest_takes_the_task_of_the_data(
    run: Run, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    suggest = peftcore.suggest

    def recorded(*positional: Any, **arguments: Any) -> Any:
        asked.update(arguments)
        return suggest(*positional, **arguments)

    monkeypatch.setattr(peftcore, "suggest", recorded)
    data = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "the", "chosen": "good", "rejected": "bad"}] * 30)
    shown = " ".join(run("suggest", "-m", llama, "--method", "lora", "--data", data).output.split())
    assert asked["loss"] == "dpo"
    assert f"-d {data} -o RUN" in shown and "--task" not in shown  # train takes it from the data, too
    run("suggest", "-m", llama, "--method", "lora")
    assert asked["loss"] is None
