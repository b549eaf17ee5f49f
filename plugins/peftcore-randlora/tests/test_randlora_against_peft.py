"""Hugging Face PEFT loads adapters saved here with the same logits, and vice versa."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peftcore_randlora import Scaled
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
    "dense": {"r": 5, "randlora_alpha": 5},
    "sparse": {"r": 8, "sparse": True},
    "very sparse": {"r": 8, "very_sparse": True},
}


@pytest.mark.parametrize(
    ("kind", "case"), [*((kind, "dense") for kind in TARGETS), *(("llama", case) for case in [*CASES][1:])]
)
def test_files(kind: str, case: str, tmp_path: Path) -> None:
    fields = {"target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2", **CASES[case]}
    model = peftcore.apply(tiny.MODELS[kind](), "randlora", **fields)
    both_ways(tiny.MODELS[kind], tmp_path, model, peft.RandLoraConfig(task_type=TASKS[kind], **fields))


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    by, a, gamma = (torch.randn(*sizes, dtype=torch.float64) for sizes in ((3, 2), (3, 5), (2, 5)))
    inputs = (by.requires_grad_(), a, gamma.requires_grad_())
    assert torch.autograd.gradcheck(Scaled.apply, inputs)
