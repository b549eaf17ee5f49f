"""A model with its adapter beside the weights as ONNX, run by onnxruntime."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from support.exported import apply, llama
from support.releases import TORCH_2_9
from support.tiny import convnet

import peftcore
from peftcore import PeftcoreError


@pytest.mark.skipif(TORCH_2_9, reason="refused: torch.export of PyTorch 2.9 excludes batches of one")
def test_it_computes_the_same_for_any_batch(tmp_path: Path) -> None:
    model = apply(llama(num_hidden_layers=1), r=4, lora_dropout=0.5, target_modules=["q_proj", "down_proj"]).train()
    file = peftcore.export(model, tmp_path / "model.onnx", format="onnx")
    assert model.training
    session = onnxruntime.InferenceSession(file)
    for batch, length in ((1, 1), (3, 11)):
        tokens = torch.randint(0, 260, (batch, length), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(tokens)
        mask[0, : length // 2] = 0
        (found,) = session.run(None, {"input_ids": tokens.numpy(), "attention_mask": mask.numpy()})
        with torch.no_grad():
            expected = model.eval()(input_ids=tokens, attention_mask=mask).logits
        assert np.abs(found - expected.numpy())[mask.bool().numpy()].max() < 1e-5


def test_an_error_leaves_the_file_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_model: Any, _inputs: Any, path: Path, **_options: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.onnx, "export", failing)
    file = tmp_path / "model.onnx"
    file.write_bytes(b"whole")
    with pytest.raises(KeyboardInterrupt):
        peftcore.export(llama(num_hidden_layers=1), file, format="onnx")
    assert [*tmp_path.iterdir()] == [file] and file.read_bytes() == b"whole"
    assert logging.root.manager.disable == 0


def test_only_models_of_text(tmp_path: Path) -> None:
    with pytest.raises(PeftcoreError, match=r"does not take input_ids\. Only text models"):
        peftcore.export(convnet(), tmp_path / "model.onnx", format="onnx")


def test_a_failure_leaves_the_mode_of_each_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def export(*_args: object, **_kwargs: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(torch.onnx, "export", export)
    model = peftcore.apply(llama(num_hidden_layers=1), "lora", r=2).train()
    model.model.norm.eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(
        PeftcoreError, match=r"LlamaForCausalLM cannot be exported to ONNX: NotImplementedError\. It may help"
    ):
        peftcore.export(model, tmp_path / "model.onnx", format="onnx")
    assert [module.training for module in model.modules()] == before
