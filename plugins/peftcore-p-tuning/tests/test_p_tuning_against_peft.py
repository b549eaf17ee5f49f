"""Hugging Face PEFT reads what is saved here, and the other way round, with the same logits."""

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
    ours = peftcore.apply(tiny.MODELS[kind](), "p-tuning", **fields)
    both_ways(tiny.MODELS[kind], tmp_path, ours, peft.PromptEncoderConfig(task_type=TASKS[kind], **fields))


@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
def test_the_network_is_in_the_file_for_training_alone(encoder: str, tmp_path: Path) -> None:
    fields = {"num_virtual_tokens": 4, "encoder_reparameterization_type": encoder, "encoder_dropout": 0.5}
    ours = peftcore.apply(tiny.llama(), "p-tuning", **fields)
    wanted = tiny.logits(ours)
    peftcore.save(ours, tmp_path / "small", resumable=False)
    peftcore.save(ours.train(), tmp_path / "whole")
    assert list(load_file(tmp_path / "small" / "adapter_model.safetensors")) == ["prompt_embeddings"]
    for folder in ("small", "whole"):
        again = peftcore.load(tiny.llama(), tmp_path / folder, trainable=True)
        torch.testing.assert_close(tiny.logits(again), wanted, rtol=0, atol=1e-6)
        sizes = {name.rpartition("peftcore.default.")[2] for name, p in again.named_parameters() if p.requires_grad}
        assert ("adapter.prompt_embeddings" in sizes) == (folder == "small")
