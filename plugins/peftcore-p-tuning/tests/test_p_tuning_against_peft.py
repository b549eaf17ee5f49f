"""Hugging Face PEFT loads adapters saved here with the same logits, and vice versa."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from support import tiny
from support.against_peft import TASKS, both_ways
from support.whole_run import nightly_but

import peftcore


@pytest.mark.parametrize("kind", nightly_but(tiny.MODELS, ["llama", "t5"]))
@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
def test_files(kind: str, encoder: str, tmp_path: Path) -> None:
    fields = {"num_virtual_tokens": 4, "encoder_hidden_size": 16, "encoder_reparameterization_type": encoder}
    model = peftcore.apply(tiny.MODELS[kind](), "p-tuning", **fields)
    both_ways(tiny.MODELS[kind], tmp_path, model, peft.PromptEncoderConfig(task_type=TASKS[kind], **fields))


@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
def test_the_network_is_in_the_file_for_training_alone(encoder: str, tmp_path: Path) -> None:
    fields = {"num_virtual_tokens": 4, "encoder_reparameterization_type": encoder, "encoder_dropout": 0.5}
    model = peftcore.apply(tiny.llama(), "p-tuning", **fields)
    expected = tiny.logits(model)
    peftcore.save(model, tmp_path / "small", resumable=False)
    peftcore.save(model.train(), tmp_path / "whole")
    assert list(load_file(tmp_path / "small" / "adapter_model.safetensors")) == ["prompt_embeddings"]
    for folder in ("small", "whole"):
        reloaded = peftcore.load(tiny.llama(), tmp_path / folder, trainable=True)
        torch.testing.assert_close(tiny.logits(reloaded), expected, rtol=0, atol=1e-6)
        sizes = {name.rpartition("peftcore.default.")[2] for name, p in reloaded.named_parameters() if p.requires_grad}
        assert ("adapter.prompt_embeddings" in sizes) == (folder == "small")
