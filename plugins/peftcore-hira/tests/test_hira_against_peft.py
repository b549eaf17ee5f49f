"""Hugging Face PEFT reads what is saved here, and the other way round, with the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support import tiny
from support.against_peft import TASKS, both_ways, quiet
from support.whole_run import nightly_but

import peftcore
from peftcore.plugin import disturb

TARGETS = {
    "llama": ["k_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "bert": ["key", "output.dense"],
    "t5": ["k", "wo"],
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {"r": 4},
}


@pytest.mark.parametrize("kind", nightly_but(TARGETS, ["llama", "gpt2"]))
def test_files(kind: str, tmp_path: Path) -> None:
    fields = {"target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2", **CASES["plain"]}
    ours = peftcore.apply(tiny.MODELS[kind](), "hira", **fields)
    both_ways(tiny.MODELS[kind], tmp_path, ours, peft.HiraConfig(task_type=TASKS[kind], **fields))


def test_ranks_of_layers(tmp_path: Path) -> None:
    """Here they are honoured; PEFT 0.21 writes them down and gives each layer the rank r, which is refused."""
    fields: dict[str, Any] = {"target_modules": ["k_proj", "v_proj"], "r": 4, "rank_pattern": {"v_proj": 2}}
    ours = peftcore.apply(tiny.llama(), "hira", **fields)
    assert len(ours.model.layers[1].self_attn.v_proj.peftcore["default"].hira_A) == 2
    disturb(ours, "default", seed=1)
    peftcore.save(ours, tmp_path / "ours")
    again = peftcore.load(tiny.llama(), tmp_path / "ours")
    assert torch.equal(tiny.logits(again), tiny.logits(ours))
    theirs = quiet(peft.get_peft_model, tiny.llama(), peft.HiraConfig(**fields))
    quiet(theirs.save_pretrained, tmp_path / "theirs")
    with pytest.raises(peftcore.PeftcoreError, match=r"Remove it from adapter_config\.json"):
        peftcore.load(tiny.llama(), tmp_path / "theirs")
