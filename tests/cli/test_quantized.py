"""`train --method qlora`: the base in 4 bits, the adapter an ordinary one of LoRA that every command takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import Run
from safetensors.torch import load_file

METHOD = ("--method", "qlora", "--set", "r=4", "--set", "lora_alpha=8", "--set", "blocksize=32")
STEPS = ("--batch-size", 4, "--lr", "0.02", "--save-every", 2, "--eval-every", 3, "--steps")


def test_train_and_use(run: Run, llama: Path, reviews: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run("train", "-m", llama, "-d", reviews, "-o", output, "--eval-data", reviews, *METHOD, *STEPS, 6)
    found = json.loads((output / "result.json").read_text())
    assert found["after"]["loss"] < 0.7 * found["before"]["loss"]
    config = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and "blocksize" not in config
    run("eval", "--adapter", output / "adapter", "-d", reviews)
    run("generate", "--adapter", output / "adapter", "-p", "the film is good")
    run("merge", "--adapter", output / "adapter", "--output", tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_a_classifier(run: Run, bert: Path, labelled: Path, tmp_path: Path) -> None:
    output = tmp_path / "classifier"
    run("train", "-m", bert, "-d", labelled, "-o", output, "--eval-data", labelled, *METHOD, *STEPS, 6)
    names = load_file(output / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.classifier.weight" in names
    run("eval", "--adapter", output / "adapter", "-d", labelled)


@pytest.mark.slow
def test_resume_is_bit_exact(run: Run, llama: Path, reviews: Path, tmp_path: Path) -> None:
    results = []
    for name in ("whole", "parts"):
        output = tmp_path / name
        arguments = ("train", "-m", llama, "-d", reviews, "-o", output, "--eval-data", reviews, *METHOD, *STEPS, 4)
        run(*arguments)
        if name == "parts":  # the last checkpoint is lost
            (output / "checkpoints" / "checkpoint-4" / "complete.json").unlink()
            run(*arguments, "--resume")
        results.append(load_file(output / "adapter" / "adapter_model.safetensors"))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
