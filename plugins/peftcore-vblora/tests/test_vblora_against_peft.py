"""Hugging Face PEFT loads adapters saved here with the same logits, and vice versa."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
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
    "logits": {"vector_length": 8, "num_vectors": 16},
    "thin files": {"vector_length": 8, "num_vectors": 16, "topk": 3, "save_only_topk_weights": True},
}


@pytest.mark.parametrize(
    ("kind", "case"), [*((kind, "logits") for kind in TARGETS), *(("llama", case) for case in [*CASES][1:])]
)
def test_files(kind: str, case: str, tmp_path: Path) -> None:
    fields = {"target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2", **CASES[case]}
    model = peftcore.apply(tiny.MODELS[kind](), "vblora", **fields)
    both_ways(tiny.MODELS[kind], tmp_path, model, peft.VBLoRAConfig(task_type=TASKS[kind], **fields))


def test_a_thin_file_is_not_trained(tmp_path: Path) -> None:
    fields = {"target_modules": ["q_proj"], **CASES["thin files"]}
    model = peftcore.apply(tiny.llama(), "vblora", **fields).train()
    model(input_ids=tiny.TOKENS)  # before it was written it may
    peftcore.save(model, tmp_path)
    reloaded = peftcore.load(tiny.llama(), tmp_path)
    torch.testing.assert_close(tiny.logits(reloaded), tiny.logits(model.eval()), rtol=0, atol=1e-6)
    with pytest.raises(peftcore.PeftcoreError, match="no logits to train"):
        reloaded.train()(input_ids=tiny.TOKENS)


def test_the_bank_learns_at_a_tenth_of_the_rate() -> None:
    model = peftcore.apply(tiny.llama(), "vblora", **CASES["logits"])
    rates = {tuple(p.shape): g["lr"] for g in peftcore.parameter_groups(model, lr=1e-2) for p in g["params"]}
    assert rates.pop((16, 8)) == pytest.approx(1e-3)
    assert set(rates.values()) == {1e-2}


def test_sizes_that_pieces_do_not_fill() -> None:
    with pytest.raises(peftcore.PeftcoreError, match="vector_length=256 must divide inputs and outputs of 'model"):
        peftcore.apply(tiny.llama(), "vblora")
