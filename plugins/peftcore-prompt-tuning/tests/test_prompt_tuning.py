"""First values, the config's errors, and what a prompt refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from torch import nn

import peftcore
from peftcore import PeftcoreError


def rows(model: nn.Module) -> torch.Tensor:
    return next(
        parameter for name, parameter in model.named_parameters() if name.endswith("prompt_embeddings")
    ).detach()


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    """The folder of a tokenizer of four words: good 5, bad 6, film 7, the 8."""
    words = {"[UNK]": 0, "good": 5, "bad": 6, "film": 7, "the": 8}
    splits = {"type": "Whitespace"}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"}
    file = {"version": "1.0", "added_tokens": [], "pre_tokenizer": splits, "model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return str(tmp_path)


def test_random_values_come_from_the_seed() -> None:
    values = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        model = tiny.llama()
        torch.manual_seed(seed)
        values.append(rows(peftcore.apply(model, "prompt-tuning", num_virtual_tokens=500)))
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])
    assert values[0].shape == (500, 32) and abs(values[0].std().item() - 1) < 0.05


def test_values_from_the_vocabulary() -> None:
    model = peftcore.apply(tiny.llama(), "prompt-tuning", num_virtual_tokens=6, prompt_tuning_init="SAMPLE_VOCAB")
    equal = (rows(model)[:, None] == model.model.embed_tokens.weight).all(-1)  # [tokens, vocabulary]
    assert equal.any(-1).all()


@pytest.mark.parametrize(
    ("text", "expected"), [("bad film", [6, 7, 6, 7, 6]), ("the good the bad the film", [8, 5, 8, 6, 8])]
)
def test_values_from_a_text(text: str, expected: list[int], tokenizer: str) -> None:
    """A short text is repeated, a long one is cut."""
    fields = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": text, "tokenizer_name_or_path": tokenizer}
    model = peftcore.apply(tiny.llama(), "prompt-tuning", num_virtual_tokens=5, **fields)
    assert torch.equal(rows(model), model.model.embed_tokens.weight[expected])


def test_loading_needs_no_tokenizer(tokenizer: str, tmp_path: Path) -> None:
    fields = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "good", "tokenizer_name_or_path": tokenizer}
    model = peftcore.apply(tiny.llama(), "prompt-tuning", num_virtual_tokens=3, **fields)
    peftcore.save(model, tmp_path / "adapter")
    (tmp_path / "tokenizer.json").unlink()
    loaded = peftcore.load(tiny.llama(), tmp_path / "adapter")
    assert torch.equal(rows(loaded), rows(model))
    peftcore.save(loaded, tmp_path / "again")
    on_disk = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert on_disk["prompt_tuning_init"] == "TEXT" and "initialize" not in on_disk


def test_planning_allocates_nothing_and_needs_no_tokenizer() -> None:
    fields = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a", "tokenizer_name_or_path": "nowhere"}
    assert "160" in str(peftcore.plan(tiny.llama(), "prompt-tuning", num_virtual_tokens=5, **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be a positive whole number, found 0"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens must be a whole number, found None"),
        ({"prompt_tuning_init": "ZERO"}, "must be 'RANDOM', 'SAMPLE_VOCAB' or 'TEXT', found 'ZERO'"),
        (
            {"prompt_tuning_init": "TEXT"},
            "needs prompt_tuning_init_text and tokenizer_name_or_path, found None and None",
        ),
        ({"virtual_tokens": 4}, r"has no field 'virtual_tokens'\. Did you mean 'num_virtual_tokens'"),
        ({"token_dim": 48}, "the prompt's vectors have width 48, but the token embedding has width 32"),
        (
            {"num_virtual_tokens": 2048},
            "2048 tokens leaves no room for input, since the context of LlamaForCausalLM has 2048",
        ),
    ],
)
def test_wrong_fields(fields: dict[str, Any], message: str) -> None:
    model = tiny.llama()
    with pytest.raises(PeftcoreError, match=message):
        peftcore.apply(model, "prompt-tuning", **fields)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_name_or_path": "/nowhere"}, "the tokenizer '/nowhere' of prompt_tuning_init='TEXT' cannot be"),
        ({"tokenizer_kwargs": {"trust_remote_code": True}}, "trust_remote_code, but a config must not run code"),
        ({"prompt_tuning_init_text": " "}, "prompt_tuning_init_text=' ' has no tokens"),
    ],
)
def test_wrong_texts(changes: dict[str, Any], message: str, tokenizer: str) -> None:
    fields = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "good", "tokenizer_name_or_path": tokenizer}
    with pytest.raises(PeftcoreError, match=message):
        peftcore.apply(tiny.llama(), "prompt-tuning", num_virtual_tokens=3, **{**fields, **changes})


def test_a_model_without_tokens() -> None:
    with pytest.raises(PeftcoreError, match="needs a token embedding, but Sequential does not declare one"):
        peftcore.apply(tiny.convnet(), "prompt-tuning", token_dim=4)


def test_merging_is_refused() -> None:
    model = peftcore.apply(tiny.llama(), "prompt-tuning", num_virtual_tokens=3)
    with pytest.raises(PeftcoreError, match=r"'default' \(prompt-tuning\) cannot be merged"):
        peftcore.merge(model, undo=True)


@pytest.mark.parametrize("start", ["RANDOM", "SAMPLE_VOCAB"])
def test_a_model_without_a_token_embedding_is_refused(start: str) -> None:
    with pytest.raises(peftcore.PeftcoreError, match="needs a token embedding, but Sequential does not declare one"):
        peftcore.apply(nn.Sequential(nn.Linear(4, 4)), "prompt-tuning", prompt_tuning_init=start)
