"""Hugging Face PEFT loads adapters saved here, and vice versa; the norms that are kept; the bound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support import tiny
from support.against_peft import both_ways, quiet, same_start

import peftcore
from peftcore.plugin import disturb

TARGETS = {"llama": ["k_proj", "v_proj", "down_proj"], "bert": ["key", "output.dense"], "t5": ["k", "v", "wo"]}
TASKS = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}


@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {"r": 3, "rank_pattern": {"v_proj": 2}, "lambda_pattern": {"down_proj": 7}}),
     ("bert", {"r": 4, "bias": "delora_only", "delora_lambda": 3}),
     ("t5", {"r": 2, "init_weights": False})],
)  # fmt: skip
def test_files(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    make, fields = tiny.MODELS[kind], {"target_modules": TARGETS[kind], **options}
    config = quiet(peft.DeloraConfig, task_type=TASKS[kind], **fields)
    same_start(make, tmp_path, peftcore.apply(make(), "delora", **fields), config)
    both_ways(make, tmp_path, peftcore.apply(make(), "delora", **fields), config)


def test_the_strength_is_bounded() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(12, 9, bias=False))
    weight = model[0].weight.detach().clone()
    peftcore.apply(model, "delora", target_modules=["0"], r=4, delora_lambda=0.5)
    disturb(model, "default", seed=1, std=30.0)
    delora = model[0].peftcore["default"]
    torch.nn.init.constant_(delora.delora_lambda, 0.5)
    torch.testing.assert_close(delora.delora_w_norm, weight.norm(dim=0))
    change = delora.merged(weight, None)[0] - weight
    assert 0.01 < (change / weight.norm(dim=0)).norm() <= 0.5 + 1e-5


def test_norms_are_those_of_the_file_and_not_of_a_base_that_has_changed(tmp_path: Path) -> None:
    model = peftcore.apply(tiny.llama(), "delora", r=2, target_modules=["q_proj"])
    disturb(model, "default", seed=1)
    peftcore.save(model, tmp_path)
    reloaded = tiny.llama()
    reloaded.model.layers[0].self_attn.q_proj.weight.data *= 2
    peftcore.load(reloaded, tmp_path, check_base=False)
    actual, expected = (m.model.layers[0].self_attn.q_proj.peftcore["default"] for m in (reloaded, model))
    assert torch.equal(actual.delora_w_norm, expected.delora_w_norm)


def test_layers_that_are_not_linear_are_refused() -> None:
    with pytest.raises(peftcore.PeftcoreError, match=r"'0' matches Conv2d .* which this method cannot adapt"):
        peftcore.apply(tiny.convnet(), "delora", target_modules=["0"])
