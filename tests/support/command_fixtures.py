"""Tiny models in folders, files of examples, and a way to run commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from support.commands import SPECIAL, WORDS, Run, invoke, save_tokenizer, write_jsonl

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}


@pytest.fixture(autouse=True)
def quick_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every picture an empty file, except in tests marked `pictures`: a training draws four, 0.1 s each."""
    if request.node.get_closest_marker("pictures") is None:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, *arguments, **options: None)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(SPECIAL + WORDS), **SIZES, **special)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BERT of random weights and no head."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(SPECIAL + WORDS), **SIZES)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """Prompts and completions; which completion follows from the prompt."""
    rows = [
        {"prompt": f"the film is {word} {more}", "completion": answer}
        for word, answer in (("good", "much fun with heart"), ("bad", "no story and dull"))
        for more in ("", "very", "a", "it was", "and", "not", "the film")
    ]
    return write_jsonl(tmp_path / "reviews.jsonl", rows)


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Texts with labels; one word decides."""
    rows = [
        {"text": f"the story {rest} {word}", "label": label}
        for word, label in (("good", "up"), ("bad", "down"))
        for rest in ("is", "was", "is very", "was very", "and the film is", "is a", "with heart is", "it was")
    ]
    return write_jsonl(tmp_path / "labelled.jsonl", rows)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("train", ...)`: run a command in this process; by default it must succeed."""
    from peftcore_cli import console

    monkeypatch.setattr(console.out, "width", 200)

    def call(*arguments: Any, code: int = 0) -> Result:
        result = invoke(*arguments)
        assert result.exit_code == code, result.output
        return result

    return call
