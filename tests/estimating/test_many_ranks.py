"""Plan of a Llama of 70 billion parameters on 2 x 8 cards, compared with the shards of 16 fake ranks."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from support.commands import invoke
from support.processes import run
from support.ranks import fake
from transformers import LlamaConfig

import peftcore

SIZES = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
LLAMA_70B = LlamaConfig(**SIZES, num_hidden_layers=80, vocab_size=128256, architectures=["LlamaForCausalLM"])
PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"


@pytest.mark.nightly
def test_a_rank_of_sixteen_holds_what_the_plan_says() -> None:
    config = LLAMA_70B
    [held] = run(fake.held_by_first, config, 16, ranks=1, joined=False)
    plan = peftcore.estimate(
        config, "lora", r=16, ranks=16, shard=True, batch_size=1, length=4096, dtype=torch.bfloat16,
        gradient_checkpointing=True, device="h100",
    )  # fmt: skip
    assert plan.parts["adapters"] == held["adapters"]
    assert plan.parts["base"] == held["base"] + 2 * 4 * 64  # the frequencies of rotary embeddings are whole
    assert "one of 16 ranks (FSDP2)" in str(plan) and "fits into" in str(plan)


@pytest.mark.nightly
def test_a_rank_of_a_mesh_holds_what_the_page_prints(tmp_path: Path) -> None:
    """Tensor parallelism over the 8 cards of a machine and FSDP2 over 2 machines."""
    [held] = run(fake.held_in_mesh, LLAMA_70B, 16, 8, ranks=1, joined=False)
    part = re.search(r"```sh\npeftcore (plan -m llama-70b .*?)\n```.*?```text\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert part is not None
    command, shown = part.groups()
    LLAMA_70B.save_pretrained(tmp_path / "llama-70b")
    words = shlex.split(command.replace("\\\n", " ").replace("llama-70b", str(tmp_path / "llama-70b")))
    printed = [line.rstrip() for line in invoke(*words).output.splitlines()]
    assert all(line in printed for line in shown.splitlines() if line != "...")
    base = held["base"] + 2 * 4 * 64  # the frequencies of rotary embeddings are whole
    assert f"  base              {base / 1e6:>12,.1f} MB" in printed
    assert f"  adapters          {held['adapters'] / 1e6:>12,.1f} MB" in printed
