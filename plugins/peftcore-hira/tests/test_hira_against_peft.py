"""Hugging Face PEFT loads adapters saved here with the same logits, and vice versa."""

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
    model = peftcore.apply(tiny.MODELS[kind](), "hira", **fields)
    both_ways(tiny.MODELS[kind], tmp_path, model, peft.HiraConfig(task_type=TASKS[kind], **fields))


def test_ranks_of_layers(tmp_path: Path) -> None:
    """Here they are honoured; PEFT 0.21 writes them down and gives each layer the rank r, which is refused."""
    fields: dict[str, Any] = {"target_modules": ["k_proj", "v_proj"], "r": 4, "rank_pattern": {"v_proj": 2}}
    model = peftcore.apply(tiny.llama(), "hira", **fields)
    assert len(model.model.layers[1].self_attn.v_proj.peftcore["default"].hira_A) == 2
    disturb(model, "default", seed=1)
    peftcore.save(model, tmp_path / "peftcore")
    reloaded = peftcore.load(tiny.llama(), tmp_path / "peftcore")
    assert torch.equal(tiny.logits(reloaded), tiny.logits(model))
    peft_model = quiet(peft.get_peft_model, tiny.llama(), peft.HiraConfig(**fields))
    quiet(peft_model.save_pretrained, tmp_path / "peft")
    with pytest.raises(peftcore.PeftcoreError, match=r"Remove it from adapter_config\.json"):
        peftcore.load(tiny.llama(), tmp_path / "peft")
