"""Hugging Face PEFT loads adapters saved here with the same logits, and vice versa."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
from support import tiny
from support.against_peft import TASKS, both_ways
from support.whole_run import nightly_but

import peftcore

TARGETS = {
    "llama": ["k_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "bert": ["key", "output.dense"],
    "t5": ["k", "wo"],
}
CASES: dict[str, dict[str, Any]] = {
    "with A and B": {"r": 8},
}


@pytest.mark.parametrize("kind", nightly_but(TARGETS, ["llama", "gpt2"]))
def test_files(kind: str, tmp_path: Path) -> None:
    fields = {"target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2", **CASES["with A and B"]}
    model = peftcore.apply(tiny.MODELS[kind](), "pvera", **fields)
    both_ways(tiny.MODELS[kind], tmp_path, model, peft.PveraConfig(task_type=TASKS[kind], **fields))
