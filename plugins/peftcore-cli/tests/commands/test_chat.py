"""Conversations from a file of them to the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peftcore_cli.bases.adapter_folders import AdapterTask
from support.commands import Run, write_jsonl
from transformers import AutoModelForCausalLM

import peftcore

TEMPLATE = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"


@pytest.fixture(scope="module")
def trained(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on conversations, of which only one answer is right."""
    from peftcore_cli.app import build
    from typer.testing import CliRunner

    folder = tmp_path_factory.mktemp("chat")
    (folder / "template.jinja").write_text(TEMPLATE)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"the {word} is"},
                {"role": "assistant", "content": "good and bright"},
            ]
        }
        for word in ("film", "story", "heart", "fun") * 4
    ]
    data = write_jsonl(folder / "talk.jsonl", rows)
    words = ["train", "--model", llama, "--data", data, "--eval-data", data, "--method", "lora", "--set", "r=8"]
    words += ["--output", folder / "run", "--steps", 60, "--lr", 1e-2, "--sample", "the film is", "--sample-tokens", 4]
    words += ["--chat-template", folder / "template.jinja"]
    result = CliRunner().invoke(build([]), [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert "peftcore chat" in result.output
    return folder / "run"


def test_the_answer_is_learned_with_its_end(trained: Path) -> None:
    found = json.loads((trained / "result.json").read_text())
    assert found["after"]["loss"] < 0.1 * found["before"]["loss"]
    assert dict(found["samples"])["with the adapter"].split() == ["good", "and", "bright"]


def test_generate_uses_the_template_that_was_trained(trained: Path, run: Run) -> None:
    result = run("generate", trained, "--prompt", "the story is", "--max-new-tokens", 6)
    assert result.output.split() == ["good", "and", "bright"]
    evaluated = run("eval", trained, "--data", trained.parent / "talk.jsonl")
    assert "perplexity" in evaluated.output


def test_chat_answers_with_the_adapter_or_the_base(trained: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter(["the film is", "/reset", "/use base", "the film is", "/use tuend", "/adapters", "/help", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _prompt: next(said))
    lines = run("chat", f"tuned={trained}", "--max-new-tokens", 3).output.splitlines()
    first = lines.index("good and bright")
    assert lines[0] == "tuned answers" and lines[first + 1] == "base answers"
    assert lines[first + 2] != "good and bright"
    assert "tuned, base" in lines and any(line.startswith("/use NAME") for line in lines)
    assert next(said, None) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Pass an adapter (peftcore chat FOLDER), a model (--model MODEL), or both"),
        (["{run}", "{run}"], "two adapters have the name 'run'"),
        (["base={run}"], "two adapters have the name 'base'"),
        (["--model", "{llama}"], "has no chat template to format messages with"),
    ],
)
def test_what_cannot_be_talked_with(trained: Path, llama: Path, run: Run, arguments: list[str], message: str) -> None:
    words = [word.format(run=trained, llama=llama) for word in arguments]
    assert message in run("chat", *words, code=1).stderr


def test_an_encoder_decoder_answers_no_conversation(run: Run, llama: Path, tmp_path: Path) -> None:
    model = peftcore.apply(AutoModelForCausalLM.from_pretrained(llama), "lora", r=2)
    for task, message in (("seq2seq", "answers single texts"), ("reward", "is a reward model")):
        adapter = peftcore.save(model, tmp_path / task)
        AdapterTask(task, 512).write(adapter)
        assert message in run("chat", adapter, code=1).output
