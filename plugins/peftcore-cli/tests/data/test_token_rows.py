"""Rows of token ids, and pairs of texts: how files have them, and what is learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peftcore_cli.data import row_reading
from peftcore_cli.data.row import Row
from peftcore_cli.tasks import labelled
from peftcore_cli.tasks.registered import find
from support.commands import Run, write_jsonl

from peftcore import PeftcoreError

METHOD = ("--method", "lora", "--set", "r=4", "--device", "cpu")


@pytest.fixture
def tokenizer(llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(llama)


def read(folder: Path, fields: dict[str, Any], task: str = "causal-lm") -> Row:
    (row,) = row_reading.read_rows(write_jsonl(folder / "rows.jsonl", [fields]), task)
    return row


def test_tokens(tmp_path: Path, tokenizer: Any) -> None:
    assert read(tmp_path, {"input_ids": [4, 5, 6]}).tokens == ([4, 5, 6], [4, 5, 6])
    assert read(tmp_path, {"input_ids": "[4, 5]", "labels": "[-100, 5]"}).tokens == ([4, 5], [-100, 5])
    padded = read(tmp_path, {"input_ids": [4, 5, 0], "labels": [-100, 5, -100], "attention_mask": [1, 1, 0]})
    assert padded.tokens == ([4, 5], [-100, 5]) and padded.kind == "input_ids"
    rows = [padded, read(tmp_path, {"input_ids": [4, 5, 6, 7], "labels": [-100, -100, -100, 7]})]
    found = find("causal-lm").encode(rows, tokenizer, 3)
    assert found.examples == [{"input_ids": [4, 5], "labels": [-100, 5]}]
    assert (found.truncated, found.left_out) == (1, 1)
    with pytest.raises(PeftcoreError, match="no row has a token to learn within 3 tokens"):
        find("causal-lm").encode(rows[1:], tokenizer, 3)
    with pytest.raises(PeftcoreError, match=r"'input_ids' has the token 99, but the model's tokenizer has 23"):
        find("causal-lm").encode([read(tmp_path, {"input_ids": [4, 99]})], tokenizer, 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_ids": []}, r"'input_ids' must be a list of integers, found \[\]"),
        ({"input_ids": [1, 2.5]}, "'input_ids' must be a list of integers"),
        ({"input_ids": [1, 2], "labels": [1]}, "'labels' has 1 values, but 'input_ids' has 2"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, r"labels\[0\] must be input_ids\[0\]=1 or -100"),
        ({"input_ids": [1, 2], "labels": [1, -100]}, "the labels ignore every token"),
    ],
)
def test_wrong_tokens(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PeftcoreError, match=rf"rows.jsonl:1: {message}"):
        read(tmp_path, fields)


def test_an_unknown_shape_lists_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(PeftcoreError, match=r"found question, solution\..* prompt/completion/label \(kto\)"):
        read(tmp_path, {"question": "a", "solution": "b"})


@pytest.mark.nightly
def test_tokens_train_as_their_text_does(run: Run, llama: Path, tokenizer: Any, tmp_path: Path) -> None:
    texts = ["the film is good", "a very dull story", "it was fun", "no heart"]
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    found = []
    for name, rows in (("texts", [{"text": text} for text in texts]), ("ids", [{"input_ids": each} for each in ids])):
        path = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        arguments = ("-d", path, "--eval-data", path, "-o", tmp_path / name, *METHOD, "--steps", 2, "--lr", "0.01")
        run("train", "-m", llama, *arguments)
        result = json.loads((tmp_path / name / "result.json").read_text())
        found.append((result["before"], result["after"]))
    assert found[0] == found[1]


@pytest.mark.parametrize("keys", labelled.PAIRS)
def test_pairs(tmp_path: Path, bert: Path, keys: tuple[str, str]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bert)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]  # BERT's own
    row = read(tmp_path, {keys[0]: "the film", keys[1]: "is good", "label": "yes"}, "classification")
    assert (row.text, row.pair, row.label) == ("the film", "is good", "yes")
    assert row_reading.guess_task(tmp_path / "rows.jsonl") == "classification"
    examples = find("classification").encode([row], tokenizer, 32, ("no", "yes")).examples
    whole = tokenizer("the film", "is good")
    assert examples == [{"input_ids": whole["input_ids"], "token_type_ids": whole["token_type_ids"], "labels": 1}]
    alone = find("classification").encode([Row("f:1", "bad", label="no")], tokenizer, 32, ("no", "yes"))
    batch = find("classification").collator(tokenizer)([*examples, *alone.examples])
    assert batch["token_type_ids"].shape == batch["input_ids"].shape
    assert torch.equal(batch["token_type_ids"][0], torch.tensor(whole["token_type_ids"]))


@pytest.mark.nightly
def test_a_classifier_of_pairs(run: Run, bert: Path, tmp_path: Path) -> None:
    words = ("good", "bad", "dull", "fun")
    rows = [{"premise": a, "hypothesis": b, "label": "same" if a == b else "other"} for a in words for b in words]
    path, output = write_jsonl(tmp_path / "pairs.jsonl", rows), tmp_path / "run"
    arguments = ("-d", path, "--eval-data", path, "-o", output, *METHOD, "--steps", 4, "--lr", "0.01")
    run("train", "-m", bert, *arguments)
    found = json.loads((output / "result.json").read_text())
    assert f"{found['after']['loss']:.4f}" in run("eval", output, "-d", path).output
    assert run("generate", output, "-p", "good", "--pair", "good").output.startswith(("same", "other"))
    error = run("generate", "-m", bert, "-p", "good", "--pair", "good", code=1).output
    assert "--pair only works with a classifier (the task is causal-lm)" in error
