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
    "biases": {},
}


@pytest.mark.parametrize("kind", list(TARGETS))
def test_files(kind: str, tmp_path: Path) -> None:
    fields = {"target_modules": TARGETS[kind], **CASES["biases"]}
    model = peftcore.apply(tiny.MODELS[kind](), "beft", **fields)
    both_ways(tiny.MODELS[kind], tmp_path, model, peft.BeftConfig(task_type=TASKS[kind], **fields))
