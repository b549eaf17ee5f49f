"""Hugging Face PEFT loads adapters saved here with the same logits, and vice versa."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from support import tiny
from support.against_peft import both_ways, logits, moved, quiet
from support.whole_run import nightly_but
from torch import nn

import peftcore

TARGETS = {"llama": ["k_proj", "v_proj", "down_proj"], "bert": ["key", "output.dense"], "t5": ["k", "wo"]}
TASKS = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}


@pytest.mark.parametrize("kind", nightly_but(TARGETS, ["llama"]))
def test_files(kind: str, tmp_path: Path) -> None:
    fields = {"target_modules": TARGETS[kind], "r": 3, "random_seed": 5}
    model = peftcore.apply(tiny.MODELS[kind](), "shira", **fields)
    both_ways(tiny.MODELS[kind], tmp_path, model, peft.ShiraConfig(task_type=TASKS[kind], **fields))


@pytest.mark.parametrize("seed", [None, 3])
def test_the_places_are_those_that_peft_draws(seed: int | None) -> None:
    fields = {"target_modules": ["v_proj", "down_proj"], "r": 3, "random_seed": seed}
    model = peftcore.apply(tiny.llama(), "shira", **fields)
    peft_model = quiet(peft.get_peft_model, tiny.llama(), peft.ShiraConfig(**fields))
    for name in ("self_attn.v_proj", "mlp.down_proj"):
        actual = model.model.layers[1].get_submodule(name).peftcore["default"].shira_indices
        expected = peft_model.base_model.model.model.layers[1].get_submodule(name).shira_indices["default"]
        assert torch.equal(actual, expected) and actual.dtype == expected.dtype


def test_places_of_a_mask_of_the_user_s_are_read(tmp_path: Path) -> None:
    def first_rows(layer: torch.nn.Linear, r: int, **_: object) -> torch.Tensor:
        mask = torch.zeros(layer.out_features * layer.in_features)
        mask[: r * (layer.out_features + layer.in_features)] = 1
        return mask.view(layer.out_features, layer.in_features)

    config = quiet(peft.ShiraConfig, mask_type="mine", target_modules=["q_proj"], r=2)
    config.mask_fn = first_rows
    peft_model = moved(quiet(peft.get_peft_model, tiny.llama(), config).eval())
    quiet(peft_model.save_pretrained, tmp_path)
    model = peftcore.load(tiny.llama(), tmp_path)
    torch.testing.assert_close(logits(model), logits(peft_model), rtol=0, atol=1e-5)
    with pytest.raises(peftcore.PeftcoreError, match="mask_type='mine'"):
        peftcore.apply(tiny.llama(), "shira", r=2, mask_type="mine")


def test_layers_that_are_left_out_stay_so_for_peft(tmp_path: Path) -> None:
    """PEFT's config has no exclude_modules and no layers_to_transform: the file names the layers that are left."""
    chosen = {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["up_proj"], "layers_to_transform": [1]}
    model = peftcore.apply(tiny.llama(), "shira", r=2, **chosen)
    config = peft.ShiraConfig(r=2, task_type="CAUSAL_LM", target_modules=["model.layers.1.self_attn.q_proj"])
    both_ways(tiny.llama, tmp_path, model, config)


def test_more_numbers_than_a_weight_has() -> None:
    with pytest.raises(peftcore.PeftcoreError, match=r"needs 1536 entries of 'model\.layers\.0"):
        peftcore.apply(tiny.llama(), "shira", r=32, target_modules=["k_proj"])


def test_small_numbers_act_in_mixed_precision() -> None:
    """In bf16 1 + 0.001 is 1, so the numbers are not added to the weight there."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    nn.init.ones_(model[0].weight)
    peftcore.apply(model, "shira", r=1, random_seed=0, target_modules=["0"])
    adapter = model[0].peftcore["default"]
    nn.init.constant_(adapter.shira_weight, 1e-3)
    x = torch.tensor([[1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual = model(x)
    expected = x @ adapter.change(torch.float32).detach().T
    assert expected.abs().max() >= 1e-3
    torch.testing.assert_close(actual.float(), expected, rtol=1e-2, atol=1e-6)
