"""Plan of a Llama of 70 billion parameters on 2 x 8 cards, compared with the shards of 16 fake ranks."""

from __future__ import annotations

import fake_ranks
import pytest
import torch
from processes import run
from transformers import LlamaConfig

import peftcore

SIZES = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}


@pytest.mark.nightly
def test_a_rank_of_sixteen_holds_what_the_plan_says() -> None:
    config = LlamaConfig(**SIZES, num_hidden_layers=80, vocab_size=128256)
    [held] = run(fake_ranks.held_by_first, config, 16, ranks=1, joined=False)
    plan = peftcore.estimate(
        config, "lora", r=16, ranks=16, shard=True, batch_size=1, length=4096, dtype=torch.bfloat16,
        gradient_checkpointing=True, device="h100",
    )  # fmt: skip
    assert plan.parts["adapters"] == held["adapters"]
    assert plan.parts["base"] == held["base"] + 2 * 4 * 64  # the frequencies of rotary embeddings are whole
    assert "one of 16 ranks (FSDP2)" in str(plan) and "fits into" in str(plan)
