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
    "an A each": {"r": 4},
    "an A for two": {"r": 4, "stride_A": 2, "num_B": 3, "scaling": 0.5},
}


@pytest.mark.parametrize(
    ("kind", "case"), [*((kind, "an A each") for kind in TARGETS), *(("llama", case) for case in [*CASES][1:])]
)
def test_files(kind: str, case: str, tmp_path: Path) -> None:
    fields = {"target_modules": TARGETS[kind], **CASES[case]}
    model = peftcore.apply(tiny.MODELS[kind](), "lily", **fields)
    both_ways(tiny.MODELS[kind], tmp_path, model, peft.LilyConfig(task_type=TASKS[kind], **fields))
