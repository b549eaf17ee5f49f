"""Batches of different families, with LoRA for some sequences: every answer is that of `generate` alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peftcore_serve import command
from peftcore_serve.sequence import Event, Failed, Finished, Sampling, Sequence
from support.command_fixtures import SIZES
from support.commands import SPECIAL, WORDS, save_tokenizer

from .conftest import PROMPTS, save_adapter, written

VOCABULARY = len(SPECIAL + WORDS)
SPECIALS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES_OF_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
SIZES_OF_BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
WINDOW = {"sliding_window": 4}
# Config, its fields, and whether sequences are decoded in a batch.
FAMILIES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "gpt2": ("GPT2Config", SIZES_OF_GPT2, True),
    "bloom": ("BloomConfig", SIZES_OF_BLOOM, True),
    "opt": ("OPTConfig", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2}, True),
    "mistral": ("MistralConfig", {**SIZES, **WINDOW, "num_key_value_heads": 2}, True),
    "gemma3": ("Gemma3TextConfig", {**SIZES, **WINDOW, "head_dim": 8, "num_key_value_heads": 2}, True),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**SIZES, **EXPERTS},
        True,
    ),
    "mamba": ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, False),
}
NIGHTLY = [*FAMILIES][1:]


@pytest.mark.parametrize(
    "family", [name if name not in NIGHTLY else pytest.param(name, marks=pytest.mark.nightly) for name in FAMILIES]
)
def test_a_family(family: str, tmp_path: Path) -> None:
    kind, sizes, batches = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(vocab_size=VOCABULARY, **sizes, **SPECIALS)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "adapters" / "one", "lora", 1, r=4)
    server = command.make(str(tmp_path / "base"), tmp_path / "adapters")
    assert server.scheduler.adapters.batches == batches
    events_by_number: dict[int, Event] = {}
    text, requested, sequences = server.texts.of_base, [(name, p) for p in PROMPTS for name in (None, "one")], []
    for number, (name, prompt) in enumerate(requested):
        events = lambda event, number=number: events_by_number.update({number: event})  # noqa: E731
        sampling = Sampling(4 + number)  # they leave the batch one after the other
        sequences.append(Sequence(text.tokens(prompt), name, sampling, text.ends, text.decode, events))
    server.scheduler.submit(sequences[:3])
    while not server.scheduler.steps and batches and len(events_by_number) < 3:
        time.sleep(0.005)
    server.scheduler.submit(sequences[3:])
    while len(events_by_number) < len(requested):
        time.sleep(0.005)
    server.scheduler.close()
    failed = [event for event in events_by_number.values() if isinstance(event, Failed)]
    assert failed == []
    for number, (name, prompt) in enumerate(requested):
        event, folder = events_by_number[number], tmp_path / "adapters" / name if name else None
        assert isinstance(event, Finished)
        assert event.last_piece.text == written(tmp_path / "base", folder, prompt, 4 + number), (name, prompt)
