"""Commands on a base that GPTQ quantized: it keeps its bits, and merging makes it dense."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from int4_checkpoints import config, gptq, write_folder
from peftcore_cli.bases import models
from support import quantized
from support.commands import Run
from transformers import AutoModelForCausalLM

import peftcore


def test_the_base_keeps_its_bits(tmp_path: Path) -> None:
    dense = write_folder(quantized.llama(num_hidden_layers=1), tmp_path, config("gptq", 32), gptq, 32, smallest=1)
    loaded = models.load_model(str(tmp_path), "causal-lm", dtype="fp32", device="cpu")
    for name, weight in dense.items():
        layer = loaded.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(layer.dequantized(torch.float32), weight.float())
    empty = models.empty_model(str(tmp_path), "causal-lm")
    assert empty.model.layers[0].mlp.up_proj.quant_type == "affine4"


@pytest.mark.nightly
def test_train_eval_and_merge(run: Run, llama: Path, reviews: Path, tmp_path: Path) -> None:
    base, output = tmp_path / "base", tmp_path / "run"
    shutil.copytree(llama, base)  # for the tokenizer
    dense = write_folder(quantized.llama(num_hidden_layers=1), base, config("gptq", 32), gptq, 32, smallest=1)
    steps = ("--batch-size", 4, "--lr", "0.02", "--steps", 3)
    outcome = run("train", "-m", base, "-d", reviews, "-o", output, "--eval-data", reviews, "--method", "lora", *steps)
    result = json.loads((output / "result.json").read_text())
    assert result["after"]["loss"] < result["before"]["loss"] and "memory is not predicted" not in outcome.output
    run("merge", output / "adapter", "--output", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = peftcore.load(peftcore.quantization.load(base, dtype=torch.float32), output / "adapter").eval()
    for name, weight in dense.items():
        layer = adapted.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(layer.dequantized(torch.float32), weight.float())
    tokens = {"input_ids": torch.arange(3, 12).view(1, 9)}
    with torch.no_grad():
        torch.testing.assert_close(merged(**tokens).logits, adapted(**tokens).logits, rtol=1e-3, atol=1e-3)
    assert not hasattr(merged.config, "quantization_config")
