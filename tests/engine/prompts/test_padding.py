"""Prompts, prefixes and padding: each row computes what it computes alone."""

from __future__ import annotations

import pytest
import torch
from census import instances
from support import tiny
from support.prompted import applied, close, generate, logits, mpt, padded

from peftcore import PeftcoreError

pytestmark = pytest.mark.usefixtures("toys")


COUNTING = ["Gemma3", "Gemma4", "Mistral", "Jamba", "Bamba", "Zamba2", "Lfm2", "Qwen3Next", "FalconH1", "GptOss"]


@pytest.mark.parametrize("family", COUNTING)
def test_padding_does_not_part_a_soft_prompt_from_the_input(family: str) -> None:
    """Windows count places and recurrences run over them, padding included."""
    model = applied(instances.build(f"{family}ForCausalLM"), "soft")
    tokens = tiny.TOKENS[:1, :5]
    rows, mask = padded(tokens, 19)
    alone = generate(model, tokens, torch.ones_like(tokens)).logits
    for step, wanted in zip(generate(model, rows, mask).logits, alone, strict=True):
        close(step[1:], wanted, atol=1e-4)


def test_a_prefix_and_padding_beyond_a_window() -> None:
    model = applied(instances.build("Gemma3ForCausalLM"), "prefix")  # it looks 8 tokens back
    tokens = tiny.TOKENS[:1, :3]
    rows, mask = padded(tokens, 5)
    close(logits(model, rows, mask)[1:, -3:], logits(model, tokens))
    with pytest.raises(PeftcoreError, match="looks 8 tokens back, so padding on the left would separate the prefix"):
        logits(model, *padded(tokens, 6))


def test_padding_between_two_prompts_and_a_prefix() -> None:
    model = tiny.llama()
    for i, kind in enumerate(("soft", "prefix", "soft")):
        applied(model, kind, adapter=f"{i}", seed=i)
    tokens = tiny.TOKENS[:1, :5]
    alone = generate(model, tokens, torch.ones_like(tokens)).logits
    for step, wanted in zip(generate(model, *padded(tokens, 9)).logits, alone, strict=True):
        close(step[1:], wanted)


def test_padding_before_an_encoder_s_input() -> None:
    model = applied(tiny.t5(), "soft")
    tokens = tiny.TOKENS[:1, :5]
    rows, mask = padded(tokens, 9)
    alone = logits(model, tokens, torch.ones_like(tokens), decoder_input_ids=tokens)
    close(logits(model, rows, mask, decoder_input_ids=tokens.repeat(2, 1))[1:], alone)


def test_a_prefix_and_padding_that_counts() -> None:
    """MPT's distances count padding: rows padded on the right are as alone, others are refused."""
    model = applied(mpt(), "prefix")
    mask = torch.ones_like(tiny.TOKENS)
    mask[1, 4:] = 0
    close(logits(model, tiny.TOKENS, mask)[1, :4], logits(model, tiny.TOKENS[1:, :4])[0])
    with pytest.raises(PeftcoreError, match="MptModel includes padding in relative positions"):
        logits(model, tiny.TOKENS, mask.flip(1))
