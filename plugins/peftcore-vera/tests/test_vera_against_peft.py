"""Hugging Face PEFT loads adapters saved here with the same logits, and vice versa."""

from __future__ import annotations

from contextlib import nullcontext as nothing
from pathlib import Path

import peft
import pytest
from safetensors.torch import load_file
from support import tiny
from support.against_peft import TASKS, both_ways
from support.whole_run import nightly_but

import peftcore

TARGETS = {
    "llama": ["k_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "bert": ["key", "value", "output.dense"],
    "t5": ["k", "v", "wo"],
}


@pytest.mark.parametrize("kind", nightly_but(tiny.MODELS, ["llama", "gpt2"]))
@pytest.mark.parametrize("kept", [True, False], ids=["with A and B", "without"])
def test_files(kind: str, kept: bool, tmp_path: Path) -> None:
    # PEFT takes GPT-2's sizes for those of its transposed weights where layers are of several sizes.
    names = TARGETS[kind][:1] if kind == "gpt2" else TARGETS[kind]
    fields = {"target_modules": names, "fan_in_fan_out": kind == "gpt2", "r": 8, "save_projection": kept}
    model = peftcore.apply(tiny.MODELS[kind](), "vera", **fields)
    with pytest.warns() if not kept else nothing():
        config = peft.VeraConfig(task_type=TASKS[kind], **fields)
    both_ways(tiny.MODELS[kind], tmp_path, model, config)


def test_a_and_b_are_one_pair(tmp_path: Path) -> None:
    model = peftcore.apply(tiny.llama(), "vera", r=8)
    shared = {id(m.peftcore["default"].projections) for m in model.modules() if hasattr(m, "peftcore")}
    assert len(shared) == 1
    file = peftcore.save(model, tmp_path) / "adapter_model.safetensors"
    names = list(load_file(file))
    assert [n for n in names if "vera_A" in n or "vera_B" in n] == ["base_model.vera_A", "base_model.vera_B"]


def test_large_matrices_of_many_layers_are_loaded(tmp_path: Path) -> None:
    """They stand once in the file, and are to be counted once against what it holds."""
    model = peftcore.apply(tiny.llama(), "vera", r=4000)
    folder = peftcore.save(model, tmp_path)
    loaded = peftcore.load(tiny.llama(), folder)
    assert (tiny.logits(model) == tiny.logits(loaded)).all()
