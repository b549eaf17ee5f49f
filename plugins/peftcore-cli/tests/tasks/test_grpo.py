"""`--task grpo`: prompts with columns, functions that judge answers, and training by TRL's GRPOTrainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peftcore_cli.bases import models
from peftcore_cli.data import row_reading
from peftcore_cli.data.row import Row
from peftcore_cli.tasks import generations
from peftcore_cli.tasks.registered import find
from safetensors.torch import load_file
from support.commands import Run, write_jsonl
from support.measured import measured

from peftcore import PeftcoreError

METHOD = ("--method", "lora", "--set", "r=4", "--device", "cpu")
ROWS = [{"prompt": f"the {word} is", "wanted": "good"} for word in ("film", "story", "heart", "fun")]


@pytest.fixture
def judges(tmp_path: Path) -> Path:
    file = tmp_path / "judges.py"
    file.write_text(
        "def share(prompts, completions, wanted, **more):\n"
        "    return [text.split().count(word) / 4 for text, word in zip(completions, wanted)]\n"
        "def strict(completions):\n    return [0.0] * len(completions)\n"
        "def short(completions, **more):\n    return [1.0]\n"
        "def none(completions, **more):\n    return [None] * len(completions)\n"
    )
    return file


def test_rows(tmp_path: Path, llama: Path) -> None:
    tokenizer = models.load_tokenizer(str(llama))
    rows = row_reading.read_rows(write_jsonl(tmp_path / "rows.jsonl", ROWS[:1]), "grpo")
    (example,) = find("grpo").encode(rows, tokenizer, 8).examples
    assert example == {**ROWS[0], "prompt_ids": tokenizer("the film is")["input_ids"]}
    assert find("grpo").columns([example]) == ROWS[:1] and find("grpo").lengths([example]) == [3]
    with pytest.raises(PeftcoreError, match=r"rows.jsonl:1: the prompt must have 1 to 2 tokens .* found 3"):
        find("grpo").encode(rows, tokenizer, 2)
    turn = {"role": "assistant", "content": "a"}
    for row, message in (
        ({"question": "a"}, "grpo needs the keys prompt, found question"),
        ({"prompt": [turn]}, "'prompt' must end with a turn to answer"),
        ({"prompt": "a", "tools": [{}]}, "does not support tools"),
    ):
        with pytest.raises(PeftcoreError, match=message):
            row_reading.read_rows(write_jsonl(tmp_path / "wrong.jsonl", [row]), "grpo")


def test_functions_are_checked(judges: Path) -> None:
    given: dict[str, Any] = {"prompts": ["a", "b"], "completions": ["good", "bad"], "wanted": ["good", "good"]}
    assert generations.load_reward(f"{judges}:share")(**given) == [0.25, 0.0]
    with pytest.raises(PeftcoreError, match=r"judges.py:strict fails with TypeError: .*accept \*\*kwargs"):
        generations.load_reward(f"{judges}:strict")(**given)
    with pytest.raises(PeftcoreError, match=r"must return a list of 2 finite numbers or None, .* found \[1.0\]"):
        generations.load_reward(f"{judges}:short")(**given)
    with pytest.raises(PeftcoreError, match=r"--reward must be FILE.py:FUNCTION, found 'share'"):
        generations.load_reward("share")


def test_the_reward_of_greedy_answers(llama: Path, judges: Path) -> None:
    tokenizer, model = models.load_tokenizer(str(llama)), models.load_model(str(llama), "grpo", device="cpu")
    rows = [Row("f:1", row["prompt"], columns={"wanted": "is"}) for row in ROWS]
    examples = find("grpo").encode(rows, tokenizer, 8).examples
    answers = generations.answer(model, [generations.Case(each["prompt_ids"], "") for each in examples], tokenizer, 4)
    found = measured(
        "grpo", model, examples, tokenizer, reward=generations.load_reward(f"{judges}:share"), answer_tokens=4
    )
    wanted = sum(text.split().count("is") / 4 for text in answers) / 4
    assert found.figures == {"reward": pytest.approx(wanted)} and found.loss == pytest.approx(-wanted)
    with pytest.raises(PeftcoreError, match="returns None for every held-out answer"):
        measured("grpo", model, examples, tokenizer, reward=generations.load_reward(f"{judges}:none"), answer_tokens=4)


def test_misuse(run: Run, llama: Path, judges: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)

    def refused(*more: Any) -> str:
        arguments = ("-m", llama, "-d", path, *METHOD, "--task", "grpo", "-o", tmp_path / "no")
        return run("train", *arguments, *more, code=1).output

    assert "--task grpo needs a function that scores answers" in refused()
    assert "must be a multiple of --generations 3, found 8. Use --batch-size 3" in refused(
        "--reward", f"{judges}:share", "--generations", 3
    )
    assert "does not exist" in refused("--reward", "none.py:f") and not (tmp_path / "no").exists()
    other = ("--task", "dpo", "--reward", "a.py:f", "-o", tmp_path / "no")
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 8)
    wrong = run("train", "-m", llama, "-d", pairs, *METHOD, *other, code=1).output
    assert "--reward only works with grpo (the task is dpo)" in wrong


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")  # TRL calls what transformers has deprecated
@pytest.mark.parametrize("accumulated", [1, 2])
def test_resume_is_exact(run: Run, llama: Path, judges: Path, tmp_path: Path, accumulated: int) -> None:
    """Also in the second epoch, whose order of prompts differs from that of the first."""
    path, found = write_jsonl(tmp_path / "rows.jsonl", ROWS), []
    arguments: tuple[Any, ...] = ("-m", llama, "-d", path, "--eval-data", path, *METHOD, "--task", "grpo")
    arguments += ("--reward", f"{judges}:share", "--answer-tokens", 4, "--lr", 0.03, "--generations", 4)
    arguments += ("--batch-size", 8 // accumulated, "--grad-accum", accumulated, "--steps", 4, "--save-every", 1)
    for name, lost in (("whole", ()), ("first", (2, 3, 4)), ("second", (4,))):
        run("train", *arguments, "-o", tmp_path / name, "--keep", 9)
        for step in lost:
            (tmp_path / name / "checkpoints" / f"checkpoint-{step}" / "complete.json").unlink()
        if lost:
            said = run("train", *arguments, "-o", tmp_path / name, "--keep", 9, "--resume").output
            assert f"checkpoint-{lost[0] - 1}" in said
        found.append(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0])


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")  # TRL calls what transformers has deprecated
def test_end_to_end(run: Run, llama: Path, judges: Path, tmp_path: Path) -> None:
    path, output = write_jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "run"
    reward = ("--reward", f"{judges}:share", "--answer-tokens", 4)
    arguments = ("-m", llama, "-d", path, "--eval-data", path, *METHOD, "--task", "grpo", *reward, "--lr", 0.03)
    more = ("--steps", 25, "--eval-every", 25, "--batch-size", 16, "--generations", 8, "--metric", "reward")
    run("train", *arguments, "-o", output, *more, "--load-best")
    found = json.loads((output / "result.json").read_text())
    assert found["after"]["reward"] > found["before"]["reward"] + 0.3
    assert f"{found['after']['reward']:.4f}" in run("eval", output, "-d", path, *reward).output
    assert "--reward FILE.py:FUNCTION is required for grpo" in run("eval", output, "-d", path, code=1).output
    assert "good" in run("generate", output, "-p", "the film is", "--max-new-tokens", 4).output
