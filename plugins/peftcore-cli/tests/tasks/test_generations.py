"""Metrics of answers: prompts, greedy answers, exact match, ROUGE-L, and functions of the user's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peftcore_cli.bases import models
from peftcore_cli.data.row import Row
from peftcore_cli.tasks import generations
from peftcore_cli.tasks.generations import Case
from peftcore_cli.tasks.registered import find
from support.commands import Run

from peftcore import PeftcoreError

METHOD = ("--method", "lora", "--set", "r=4", "--device", "cpu")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "metrics.py"
    file.write_text(
        "def length(answers, wanted):\n    assert len(answers) == len(wanted)\n    return len(''.join(answers))\n"
        "def broken(answers, wanted):\n    return 1 / 0\n"
        "def text(answers, wanted):\n    return 'high'\n"
        "number = 3\n"
    )
    return file


@pytest.mark.parametrize(
    ("answer", "wanted", "score"),
    [
        ("the cat sat on the mat", "the cat was on the mat", 5 / 6),  # as the package rouge-score has it
        ("police killed the gunman", "police kill the gunman", 0.75),
        ("the gunman kill police", "police killed the gunman", 0.5),
        ("Größe, ÄPFEL!", "größe äpfel", 1.0),
        ("a b", "", 0.0),
        ("", "...", 1.0),
    ],
)
def test_rouge_l(answer: str, wanted: str, score: float) -> None:
    assert generations.rouge_l(answer, wanted) == pytest.approx(score)


def test_figures(own: Path) -> None:
    cases = [Case([1], "very good"), Case([1], "no")]
    found = generations.figures(
        [" very good\n", "yes"], cases, f"{own}:length", generations.load_function(f"{own}:length")
    )
    assert found == {"length": 14.0, "exact_match": 0.5, "rouge_l": 0.5}
    for name, message in (("broken", "fails with ZeroDivisionError"), ("text", "must return a finite number")):
        with pytest.raises(PeftcoreError, match=rf"metrics.py:{name} {message}"):
            generations.figures(["a", "b"], cases, f"{own}:{name}", generations.load_function(f"{own}:{name}"))


def test_functions_that_are_not_there(own: Path, tmp_path: Path) -> None:
    for name in ("none", "number"):
        with pytest.raises(PeftcoreError, match=f"has no function '{name}'"):
            generations.load_function(f"{own}:{name}")
    with pytest.raises(PeftcoreError, match=r"does not exist.*Pass FILE.py:FUNCTION"):
        generations.load_function(f"{tmp_path}/no.py:f")
    own.write_text("def (")
    with pytest.raises(PeftcoreError, match="fails with SyntaxError"):
        generations.load_function(f"{own}:f")


def test_cases(llama: Path) -> None:
    tokenizer = models.load_tokenizer(str(llama))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    turns = [("user", "is it"), ("assistant", "good"), ("user", "a film"), ("assistant", "bad")]
    messages = [{"role": role, "content": content} for role, content in turns]
    rows = [Row("f:1", "the film", completion="is good"), Row("f:2", "", messages=messages)]
    found = generations.cases(rows, tokenizer, 8)
    wanted = [tokenizer(text)["input_ids"] for text in ("the film", "is it good a film")]
    assert found == [Case(wanted[0], "is good"), Case(wanted[1], "bad")]
    with pytest.raises(PeftcoreError, match="f:1: the row has text, which has no prompt to answer"):
        generations.cases([Row("f:1", "the film")], tokenizer, 8)
    with pytest.raises(PeftcoreError, match=r"f:2: the prompt must have 1 to 4 tokens"):
        generations.cases(rows, tokenizer, 4)


def test_answers_are_greedy_and_in_order(llama: Path) -> None:
    tokenizer, model = models.load_tokenizer(str(llama)), models.load_model(str(llama), "causal-lm", device="cpu")
    cases = [Case(tokenizer(text)["input_ids"], "") for text in ("the film is", "it", "a very dull", "no")]
    found = generations.answer(model, cases, tokenizer, 4, batch_size=2)
    for case, answer in zip(cases, found, strict=True):
        ids = list(case.ids)
        with torch.no_grad():
            for _ in range(4):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == tokenizer.eos_token_id:
                    break
        assert answer == tokenizer.decode(ids[len(case.ids) :], skip_special_tokens=True)


def test_count() -> None:
    given = (("loss", None), ("rouge_l", None), (None, 3))
    assert [find("causal-lm").answer_count(*each) for each in given] == [0, 100, 3]
    assert find("multi-label").answer_count("exact_match", None) == 0
    with pytest.raises(PeftcoreError, match=r"only work with causal-lm and seq2seq \(the task is classification"):
        find("classification").answer_count("a.py:f", None)


def test_own_metric_chooses_the_best(run: Run, llama: Path, reviews: Path, own: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = ("-m", llama, "-d", reviews, "--holdout", 3, *METHOD, "--lr", 0.02, "--answer-tokens", 3)
    more = ("--steps", 2, "--eval-every", 1, "--load-best", "--metric", f"{own}:length")
    assert "length" in run("train", *arguments, "-o", output, *more).output
    found = json.loads((output / "result.json").read_text())
    assert found["best"]["metric"] == "length" and found["best"]["value"] == found["after"]["length"]
    assert f'metric = "{own}:length"' in (output / "run.toml").read_text()
    shown = run("eval", output, "-d", reviews, "--metric", f"{own}:length", "--answer-tokens", 3).output
    assert "length" in shown and "ROUGE-L" in shown
    for metric in (("loss",), ("lenght", "--eval-answers", 2)):
        assert "eval shows every metric" in run("eval", output, "-d", reviews, "--metric", *metric, code=1).output
    wrong = run("train", *arguments, "-o", tmp_path / "no", "--metric", f"{own}:none", code=1).output
    assert "has no function 'none'" in wrong and not (tmp_path / "no").exists()
