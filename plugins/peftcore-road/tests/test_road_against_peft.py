"""Hugging Face PEFT loads adapters saved here, and vice versa; layers are named where they must be."""

from __future__ import annotations

import json
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
    [("llama", {"group_size": 8}),
     ("bert", {"group_size": 16, "variant": "road_2"}),
     ("t5", {"group_size": 4, "variant": "road_4", "init_weights": False})],
)  # fmt: skip
def test_files(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    make, fields = tiny.MODELS[kind], {"target_modules": TARGETS[kind], **options}
    config = quiet(peft.RoadConfig, task_type=TASKS[kind], **fields)
    same_start(make, tmp_path, peftcore.apply(make(), "road", **fields), config)
    both_ways(make, tmp_path, peftcore.apply(make(), "road", **fields), config)


def test_layers_are_named_where_peft_has_no_other_way(tmp_path: Path) -> None:
    fields = {"group_size": 8, "target_modules": ["q_proj", "v_proj"], "exclude_modules": ["0.self_attn.q_proj"]}
    model = peftcore.apply(tiny.llama(), "road", **fields)
    disturb(model, "default", seed=1)
    config = json.loads((peftcore.save(model, tmp_path) / "adapter_config.json").read_text())
    assert "exclude_modules" not in config and len(config["target_modules"]) >= 2
    peft_model = quiet(peft.PeftModel.from_pretrained, tiny.llama(), tmp_path)
    assert sum(name.endswith("road_theta") for name, module in peft_model.named_modules()) == 3
    torch.testing.assert_close(tiny.logits(peft_model.eval()), tiny.logits(model), rtol=0, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(peftcore.PeftcoreError, match="group_size=64 does not divide the 32 outputs of 'model"):
        peftcore.apply(tiny.llama(), "road")
    with pytest.raises(peftcore.PeftcoreError, match="group_size must be even, found 3"):
        peftcore.apply(tiny.llama(), "road", group_size=3)


def test_layers_that_are_not_linear_are_refused() -> None:
    with pytest.raises(peftcore.PeftcoreError, match=r"'0' matches Conv2d .* which this method cannot adapt"):
        peftcore.apply(tiny.convnet(), "road", target_modules=["0"])
