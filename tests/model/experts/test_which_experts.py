"""Which experts a config of a method for linear layers names, here and in PEFT."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.against_peft import quiet
from support.mixtures import INPUTS, mixture
from torch import nn

import peftcore
from peftcore.engine import applied
from peftcore.files.tensors import tensors_on_disk
from peftcore.testing import disturb


def applied_to(model: nn.Module, method: str, **fields: Any) -> nn.Module:
    peftcore.apply(model, method, **fields)
    disturb(model, "default", seed=1, std=0.05)
    return model


@pytest.mark.parametrize(
    ("fields", "names", "weights"),
    [
        ({"target_modules": ["experts"]}, ["experts"], 2),
        ({"target_modules": ["down_proj"]}, ["down_proj"], 1),
        ({"target_modules": ".*experts.gate.*"}, ".*experts.gate.*", 1),
        ({"target_modules": ["experts"], "exclude_modules": ["gate_up_proj"]}, ["experts"], 1),
        ({"target_modules": ["q_proj", "experts"], "exclude_modules": ["experts"]}, ["q_proj", "experts"], 0),
        ({"target_modules": ["q_proj", "experts"], "layers_to_transform": [1]}, ["q_proj", "experts"], 1),
    ],
)
def test_which_experts_are_meant(fields: dict[str, Any], names: Any, weights: int, tmp_path: Path) -> None:
    method = "hra" if "exclude_modules" in fields else "loha"
    model = applied_to(mixture("qwen3_moe"), method, **({"r": 4} if method == "hra" else {}), **fields)
    assert applied(model, "default").config.target_modules == names
    modules = [path for path in applied(model, "default").paths if path.endswith("experts")]
    assert len(modules) == (0 if not weights else 1 if "layers_to_transform" in fields else 2)
    reached = {
        name.split(".experts.")[1].split(".")[1] for name in tensors_on_disk(model, "default") if "experts" in name
    }
    assert len(reached) == (2 if "layers_to_transform" in fields else weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peftcore.save(model, tmp_path)
    assert torch.equal(peftcore.load(mixture("qwen3_moe"), tmp_path)(**INPUTS).logits, model(**INPUTS).logits)


def test_suffixes_of_what_is_left_when_fields_that_peft_lacks_are_worked_in() -> None:
    fields = {"target_modules": ["q_proj", "experts"], "exclude_modules": ["experts.gate_up_proj"]}
    plan = peftcore.plan(mixture("qwen3_moe", num_hidden_layers=1), "unilora", **fields)
    assert plan.config.target_modules == ["q_proj", "experts.down_proj"] and plan.config.exclude_modules is None
    assert plan.matches == {"q_proj": 1, "experts.down_proj": 1}


def test_an_entry_that_means_layers_means_no_experts() -> None:
    """As in files of before, and of PEFT."""
    model = applied_to(mixture("deepseek_v3"), "loha", target_modules=["down_proj"])
    assert not any(path.endswith(".experts") for path in applied(model, "default").paths)
    model = applied_to(mixture("deepseek_v3"), "loha", target_modules=["down_proj", "experts.down_proj"])
    assert any(path.endswith(".experts") for path in applied(model, "default").paths)


def test_a_config_of_peft_means_what_it_means_there() -> None:
    named = {"target_modules": ["q_proj", "down_proj"]}
    with pytest.raises(
        peftcore.PeftcoreError, match=r"peft.LoHaConfig names 'down_proj' in target_modules, which is not a layer"
    ):
        peftcore.apply(mixture("qwen3_moe", num_hidden_layers=1), peft.LoHaConfig(**named))
    theirs = quiet(peft.get_peft_model, mixture("qwen3_moe", num_hidden_layers=1), peft.LoHaConfig(**named))
    assert not any("experts" in name for name, p in theirs.named_parameters() if p.requires_grad)


def test_a_file_of_peft_means_what_it_means_there(tmp_path: Path) -> None:
    config = peft.LoHaConfig(target_modules=["q_proj", "down_proj"])
    quiet(quiet(peft.get_peft_model, mixture("qwen3_moe", num_hidden_layers=1), config).save_pretrained, tmp_path)
    ours = peftcore.load(mixture("qwen3_moe", num_hidden_layers=1), tmp_path)
    assert applied(ours, "default").paths == ("model.layers.0.self_attn.q_proj",)
