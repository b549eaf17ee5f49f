"""Options and fields by the names of other programs, and folders that are not what an option takes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import save_file
from support.commands import Run, write_jsonl

import peftcore
from peftcore.cli import signatures, synonyms
from peftcore.cli.commands.train import train


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


def test_fields() -> None:
    known = ["r", "lora_alpha", "lora_dropout", "target_modules"]
    assert synonyms.of_field("rank", known) == ". Did you mean 'r'?"
    assert synonyms.of_field("lora_rank", known) == ". Did you mean 'r'?"
    assert synonyms.of_field("dropout", known) == ". Did you mean 'lora_dropout'?"
    assert synonyms.of_field("target_module", known) == " (nearest: 'target_modules')"
    assert synonyms.of_field("zzz", known) == ""


def test_a_folder_without_a_model(run: Run, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "texts.jsonl", [{"text": "good"}, {"text": "bad"}])
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "notes.txt").write_text("")
    arguments = ("-d", data, "--method", "lora", "-o", tmp_path / "run")
    output = run("train", "-m", tmp_path / "odd", *arguments, code=1).output
    assert "has no model: config.json is missing, found notes.txt." in " ".join(output.split())
    (tmp_path / "odd" / "adapter_config.json").write_text("{}")
    output = run("train", "-m", tmp_path / "odd", *arguments, code=1).output
    assert "is an adapter, not a base. Pass it as --adapter" in " ".join(output.split())


def test_info_takes_the_folder_as_other_commands_do(run: Run, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    save_file({}, tmp_path / "adapter_model.safetensors")
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(2, 3)}, tmp_path / "adapter_model.safetensors")
    assert run("info", "--adapter", tmp_path).output == run("info", tmp_path).output
    assert "info shows one adapter. Pass its folder" in run("info", code=1).output
    assert "info shows one adapter" in run("info", tmp_path, "-a", tmp_path, code=1).output


def test_suggest_takes_the_task_of_the_data(
    run: Run, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def suggest(*_: Any, **arguments: Any) -> Any:
        asked.update(arguments)
        return SimpleNamespace(ways=[SimpleNamespace(options=lambda: ["--method", "lora"])])

    monkeypatch.setattr(peftcore, "suggest", suggest)
    data = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "the", "chosen": "good", "rejected": "bad"}] * 30)
    shown = " ".join(run("suggest", "-m", llama, "--method", "lora", "--data", data).output.split())
    assert asked["loss"] == "dpo"
    assert f"-d {data} -o RUN" in shown and "--task" not in shown  # train takes it from the data, too
    run("suggest", "-m", llama, "--method", "lora")
    assert asked["loss"] is None
