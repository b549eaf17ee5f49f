"""Hugging Face PEFT loads adapters saved here with the same logits, and vice versa."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
from support import tiny
from support.against_peft import TASKS, both_ways

import peftcore

TARGETS = {
    "llama": ["k_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "bert": ["key", "output.dense"],
    "t5": ["k", "wo"],
}
CASES: dict[str, dict[str, Any]] = {
    "a vector each": {"u": 5},
    "shared by groups": {"u": 5, "weight_tying": 0.6},
    "shared by all": {"u": 5, "r": 3, "weight_tying": 1.0, "init_weights": "uniform"},
}


@pytest.mark.parametrize(
    ("kind", "case"), [*((kind, "a vector each") for kind in TARGETS), *(("llama", case) for case in [*CASES][1:])]
)
def test_files(kind: str, case: str, tmp_path: Path) -> None:
    fields = {"target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2", **CASES[case]}
    model = peftcore.apply(tiny.MODELS[kind](), "tinylora", **fields)
    both_ways(tiny.MODELS[kind], tmp_path, model, peft.TinyLoraConfig(task_type=TASKS[kind], **fields))
