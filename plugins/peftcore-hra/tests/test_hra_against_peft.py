"""Hugging Face PEFT loads adapters saved here, and vice versa; reflections keep lengths; warnings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peftcore_hra import HRA, HRAConfig
from support import tiny
from support.against_peft import both_ways, quiet, same_start

import peftcore

TARGETS = {"llama": ["k_proj", "v_proj", "down_proj"], "bert": ["key", "output.dense"], "t5": ["k", "v", "wo"]}
TASKS = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}


@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {"r": 4}),
     ("bert", {"r": 2, "bias": "hra_only"}),
     ("llama", {"r": 4, "init_weights": False, "apply_GS": True}),
     ("t5", {"r": 3, "init_weights": False})],
)  # fmt: skip
def test_files(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    make, fields = tiny.MODELS[kind], {"target_modules": TARGETS[kind], **options}
    config = quiet(peft.HRAConfig, task_type=TASKS[kind], **fields)
    same_start(make, tmp_path, peftcore.apply(make(), "hra", **fields), config)
    both_ways(make, tmp_path, peftcore.apply(make(), "hra", **fields), config)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_lengths_are_kept(orthogonal: bool) -> None:
    hra = HRA(HRAConfig(r=5, apply_GS=orthogonal, init_weights=False), 12)
    x = torch.randn(7, 12)
    reflected = hra(lambda x: x, x)
    torch.testing.assert_close(reflected.norm(dim=1), x.norm(dim=1))
    assert (reflected - x).abs().max() > 0.1


@pytest.mark.parametrize("fields", [{"r": 3}, {"apply_GS": True}])
def test_a_start_that_changes_the_model_is_said(fields: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match=r": the reflections do not cancel at init"):
        peftcore.apply(tiny.llama(), "hra", **fields)


def test_more_orthogonal_reflections_than_inputs_are_refused() -> None:
    with pytest.raises(peftcore.PeftcoreError, match="r=33 is above the 32 inputs of"):
        peftcore.apply(tiny.llama(), "hra", r=33, apply_GS=True)
