"""TinyLoRA of embeddings: files to and from PEFT, merged, dropout, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support import tiny
from support.against_peft import Layer, both_ways, same_layer
from torch import nn

import peftcore
from peftcore.plugin import disturb
from peftcore.testing.families import FAMILIES

IDS = torch.tensor([[1, 2, 3, 5], [4, 19, 0, 5]])


@pytest.mark.parametrize("fields", [{"r": 3, "u": 6}, {"r": 30, "u": 4, "init_weights": "uniform"}])
def test_files(fields: dict[str, Any], tmp_path: Path) -> None:
    config = peft.TinyLoraConfig(target_modules=["layer"], **fields)
    same_layer(lambda: nn.Embedding(20, 8, padding_idx=0), IDS, tmp_path, config, "tinylora", **fields)


@pytest.mark.parametrize("tying", [0.0, 0.6])
def test_embedding_of_a_model(tying: float, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"target_modules": ["embed_tokens", "q_proj"], "u": 5, "weight_tying": tying}
    model = peftcore.apply(tiny.llama(), "tinylora", **fields)
    both_ways(tiny.llama, tmp_path, model, peft.TinyLoraConfig(task_type="CAUSAL_LM", **fields))


def test_numbers_of_the_subspace_are_dropped_in_training() -> None:
    model = Layer(nn.Embedding(20, 8))
    disturb(peftcore.apply(model, "tinylora", target_modules=["layer"], tinylora_dropout=0.9), "default", seed=1)
    added = model.eval()(IDS).detach() - model.layer.weight[IDS]
    actual = model.train()(IDS).detach() - model.layer.weight[IDS]
    assert 0 < (actual.abs() < 1e-6).all(-1).sum() < 8 and (added.abs() > 1e-6).any(-1).all()


def test_a_scaled_embedding_is_refused() -> None:
    with pytest.raises(peftcore.PeftcoreError, match="multiplies its output by embed_scale, which PEFT does not"):
        peftcore.apply(FAMILIES["Gemma"].make(), "tinylora", target_modules=["embed_tokens"])
