"""Hugging Face PEFT loads adapters saved here with the same logits, and vice versa."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from support import tiny
from support.against_peft import TASKS, both_ways
from support.whole_run import nightly_but

import peftcore
from peftcore.plugin import disturb

TARGETS = {
    "llama": ["k_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "bert": ["key", "value", "output.dense"],
    "t5": ["k", "v", "wo"],
}


@pytest.mark.parametrize("kind", nightly_but(tiny.MODELS, ["llama", "gpt2"]))
def test_files(kind: str, tmp_path: Path) -> None:
    names = TARGETS[kind]
    fields = {"target_modules": names, "feedforward_modules": names[-1:], "fan_in_fan_out": kind == "gpt2"}
    model = peftcore.apply(tiny.MODELS[kind](), "ia3")  # every linear layer
    both_ways(tiny.MODELS[kind], tmp_path, model, peft.IA3Config(task_type=TASKS[kind], **fields))


@pytest.mark.parametrize("of_input", [True, False], ids=["input", "output"])
def test_convolutions(of_input: bool, tmp_path: Path) -> None:
    make = lambda: torch.manual_seed(0) and torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, groups=2), torch.nn.ReLU())  # noqa: E731
    x = torch.linspace(-1, 1, 2 * 4 * 25).sin().view(2, 4, 5, 5)
    fields = {"target_modules": ["0"], "feedforward_modules": ["0"] if of_input else []}
    model = peftcore.apply(make(), "ia3", **fields)
    disturb(model, "default", seed=1)
    expected = model(x)
    peftcore.save(model, tmp_path)
    peft_model = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(peft_model(x), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(peftcore.merge(model, undo=True)(x), expected, rtol=0, atol=1e-5)


def test_the_inputs_of_a_feed_forward_s_last_layer_are_scaled() -> None:
    model = peftcore.apply(tiny.llama(), "ia3")
    (actual,) = {tuple(layer.mlp.down_proj.peftcore["default"].ia3_l.shape) for layer in model.model.layers}
    assert actual == (1, model.config.intermediate_size)
    assert model.model.layers[0].self_attn.k_proj.peftcore["default"].ia3_l.shape[1] == 1
