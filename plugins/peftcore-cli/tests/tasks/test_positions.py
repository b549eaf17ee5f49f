"""Texts that are longer than a model's table of positions are errors that give the number of positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peftcore_cli.tasks import positions
from support.commands import SPECIAL, WORDS, Run, save_tokenizer, write_jsonl
from transformers import AutoConfig, AutoModel, GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from peftcore import PeftcoreError

WIDTHS = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("kind", "fields", "known"),
    [
        ("bert", WIDTHS, 24),
        ("roberta", {**WIDTHS, "pad_token_id": 1}, 22),
        ("gpt2", {"n_embd": 16, "n_layer": 1, "n_head": 2}, 24),
        ("opt", {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 1}, 24),
        ("llama", WIDTHS, None),
    ],
)
def test_tables_of_positions(kind: str, fields: dict[str, Any], known: int | None) -> None:
    fields = {"max_position_embeddings": 24, "vocab_size": 40, "num_attention_heads": 2, **fields}
    model = AutoModel.from_config(AutoConfig.for_model(kind, **fields)).eval()
    assert positions.number_of_positions(model) == known
    if known is None:
        positions.check(model, 10**6)
        return
    ids = torch.full((1, known), 5)
    model(ids)
    positions.check(model, known)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, known + 1), 5))
    with pytest.raises(PeftcoreError, match=rf"has positions for {known} tokens, .* Pass --max-length {known}"):
        positions.check(model, known + 1)


def gpt2(folder: Path) -> Path:
    """Write a base with 12 positions."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(SPECIAL + WORDS), n_embd=16, n_layer=1, n_head=2, n_positions=12)
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 1, 2
    GPT2LMHeadModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_commands_report_texts_that_are_too_long(run: Run, tmp_path: Path) -> None:
    gpt2(tmp_path / "base")
    rows = [{"prompt": f"the film is {word}", "completion": "it was fun and " * 3} for word in WORDS]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    options = ("train", "-m", tmp_path / "base", "-d", path, "--method", "lora", "--steps", 1, "-o", tmp_path / "run")
    found = run(*options, code=1).output
    assert "has positions for 12 tokens, found a text with 17. Pass --max-length 12" in found
    run(*options, "--max-length", 12)
    assert "found a text with 17" in run("eval", tmp_path / "run", "-d", path, "--max-length", 40, code=1).output
    assert "but a prompt and its answer exceed them" in run("generate", tmp_path / "run", "-p", "a", code=1).output


def test_streamed_texts_are_cut_at_the_last_position(run: Run, tmp_path: Path) -> None:
    """Their lengths are not known before: a --max-length above the positions is an error for none of them."""
    base = gpt2(tmp_path / "base")
    rows = [{"text": f"the film is {word}" + " and it was fun" * (4 if i == 8 else 1)} for i, word in enumerate(WORDS)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    options = ("-m", base, "-d", path, "--method", "lora", "--streaming", "--holdout", 2, "--batch-size", 4)
    for length, warns in ((40, True), (12, False)):
        output = tmp_path / str(length)
        printed = run("train", *options, "--steps", 5, "--max-length", length, "-o", output).output
        assert ("positions for 12 tokens, so --max-length 40 is reduced to 12" in printed) is warns
        assert json.loads((output / "adapter" / "peftcore_task.json").read_text())["max_length"] == 12
    files = [(tmp_path / each / "adapter" / "adapter_model.safetensors").read_bytes() for each in ("40", "12")]
    assert files[0] == files[1]


def test_a_classifier_reports_texts_that_are_too_long(run: Run, labelled: Path, tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=len(SPECIAL + WORDS), n_embd=16, n_layer=1, n_head=2, n_positions=12)
    config.pad_token_id = 0
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    run("train", "-m", tmp_path / "base", "-d", labelled, "--method", "lora", "--steps", 1, "-o", tmp_path / "run")
    rows = write_jsonl(tmp_path / "long.jsonl", [{"text": "the film is good " * 5, "label": "up"}])
    for command in ("predict", "eval"):
        found = run(command, tmp_path / "run", "-d", rows, code=1).output
        assert "has positions for 12 tokens, found a text with 20. Pass --max-length 12" in found
        run(command, tmp_path / "run", "-d", rows, "--max-length", 12)
    found = run("generate", tmp_path / "run", "-p", "the film is good " * 5, code=1).output
    assert "has positions for 12 tokens, found a text with 20. Pass a shorter text" in found
    assert "the text has no tokens" in run("generate", tmp_path / "run", "-p", "", code=1).output
