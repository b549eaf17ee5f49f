"""Hugging Face PEFT loads adapters saved here with the same logits, and vice versa."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
from support import tiny
from support.against_peft import both_ways

import peftcore

TARGETS = {"llama": ["k_proj", "v_proj", "down_proj"], "bert": ["key", "output.dense"], "t5": ["k", "wo"]}
TASKS = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
CASES: dict[str, dict[str, Any]] = {
    "flat": {"r": 4},
    "deep": {"r": 4, "depth": 2, "act_fn": "gelu", "scaling": 0.5},
}


@pytest.mark.parametrize(
    ("kind", "case"), [*((kind, "flat") for kind in TARGETS), *(("llama", case) for case in [*CASES][1:])]
)
def test_files(kind: str, case: str, tmp_path: Path) -> None:
    fields = {"target_modules": TARGETS[kind], **CASES[case]}
    model = peftcore.apply(tiny.MODELS[kind](), "peanut", **fields)
    both_ways(tiny.MODELS[kind], tmp_path, model, peft.PeanutConfig(task_type=TASKS[kind], **fields))
