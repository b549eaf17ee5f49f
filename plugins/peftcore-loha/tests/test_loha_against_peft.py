"""Hugging Face PEFT loads adapters saved here, and vice versa; dropout; errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support import tiny
from support.against_peft import both_ways, same_start

import peftcore
from peftcore.plugin import disturb

TARGETS = {"llama": ["k_proj", "v_proj", "down_proj"], "bert": ["key", "output.dense"], "t5": ["k", "v", "wo"]}
TASKS = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}


@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {"r": 3}), ("llama", {"r": 16, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"down_proj": 9}}),
     ("bert", {"r": 8, "init_weights": False}), ("t5", {"r": 2, "use_effective_conv2d": True})],
)  # fmt: skip
def test_files(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    make, fields = tiny.MODELS[kind], {"target_modules": TARGETS[kind], "alpha": 6, **options}
    config = peft.LoHaConfig(task_type=TASKS[kind], **fields)
    same_start(make, tmp_path, peftcore.apply(make(), "loha", **fields), config)
    both_ways(make, tmp_path, peftcore.apply(make(), "loha", **fields), config)


def layer(**fields: Any) -> tuple[Any, Any, Any, Any]:
    """A layer with a LoHa, what it gives without, what that adds, and the input."""
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(24, 40)), torch.randn(5, 24)
    plain = model(x).detach()
    disturb(peftcore.apply(model, "loha", target_modules=["0"], r=2, **fields), "default", seed=1)
    return model, plain, model.eval()(x).detach() - plain, x


def test_outputs_are_dropped_in_training_and_the_others_make_up_for_them() -> None:
    model, plain, delta, x = layer(rank_dropout=0.5)
    actual = model.train()(x).detach() - plain
    dropped = (actual.abs() < 1e-6).all(0)
    assert 0 < dropped.sum() < 40
    scale = 40 / (40 - dropped.sum())
    torch.testing.assert_close(actual[:, ~dropped], scale * delta[:, ~dropped], rtol=0, atol=1e-5)


def test_a_layer_s_update_is_dropped_as_a_whole() -> None:
    model, plain, delta, x = layer(module_dropout=0.5)
    shares = [((model.train()(x) - plain).norm() / delta.norm()).item() for _ in range(40)]
    assert 5 < sum(abs(share - 1) < 1e-4 for share in shares) < 35
    assert all(min(abs(share), abs(share - 1)) < 1e-4 for share in shares)


def test_save_says_that_peft_has_it_for_no_conv1d(tmp_path: Path) -> None:
    model = peftcore.apply(tiny.gpt2(), "loha")
    with pytest.warns(UserWarning, match="Hugging Face PEFT cannot read this file"):
        peftcore.save(model, tmp_path)
