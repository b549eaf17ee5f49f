"""Hugging Face PEFT loads adapters saved here, and vice versa; the formula; how sizes are divided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, strategies as st
from peft.tuners.lokr.layer import factorization
from peftcore_lokr import split_size
from support import tiny
from support.against_peft import both_ways, same_start

import peftcore
from peftcore.plugin import disturb

TARGETS = {"llama": ["k_proj", "v_proj", "down_proj"], "bert": ["key", "output.dense"], "t5": ["k", "v", "wo"]}
TASKS = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}


@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {"r": 2}), ("llama", {"r": 8, "rank_pattern": {"v_proj": 1}, "alpha_pattern": {"down_proj": 9}}),
     ("bert", {"r": 1, "decompose_both": True, "decompose_factor": 8}), ("t5", {"r": 2, "init_weights": "lycoris"}),
     ("t5", {"r": 8, "init_weights": False, "decompose_factor": 5})],
)  # fmt: skip
def test_files(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    make, fields = tiny.MODELS[kind], {"target_modules": TARGETS[kind], "alpha": 6, **options}
    config = peft.LoKrConfig(task_type=TASKS[kind], **fields)
    same_start(make, tmp_path, peftcore.apply(make(), "lokr", **fields), config)
    both_ways(make, tmp_path, peftcore.apply(make(), "lokr", **fields), config)


@given(st.integers(1, 5000), st.one_of(st.just(-1), st.integers(1, 100)))
def test_sizes_are_divided_as_peft_does(size: int, factor: int) -> None:
    assert split_size(size, factor) == factorization(size, factor)


@pytest.mark.parametrize("rescaled", [True, False])
def test_outputs_are_dropped_in_training(rescaled: bool) -> None:
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(24, 40)), torch.randn(5, 24)
    plain = model(x).detach()
    fields = {"target_modules": ["0"], "rank_dropout": 0.5, "rank_dropout_scale": rescaled}
    disturb(peftcore.apply(model, "lokr", **fields), "default", seed=1)
    delta, actual = model.eval()(x).detach() - plain, model.train()(x).detach() - plain
    dropped = (actual.abs() < 1e-6).all(0)
    assert 0 < dropped.sum() < 40
    scale = 40 / (40 - dropped.sum()) if rescaled else 1
    torch.testing.assert_close(actual[:, ~dropped], scale * delta[:, ~dropped], rtol=0, atol=1e-5)


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(peftcore.PeftcoreError, match="decompose_factor must be -1 or positive, found 0"):
        peftcore.apply(tiny.llama(), "lokr", decompose_factor=0)
