"""`--precision`: mixed in training, the base's own where it is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import Run

METHOD = ("--method", "lora", "--set", "r=4", "--set", "lora_alpha=8")
STEPS = ("--steps", 6, "--batch-size", 4, "--lr", "0.02", "--eval-every", 3)


def result_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "result.json").read_text())


def test_mixed_precision_trains_in_bf16_and_is_measured_as_eval_does(
    run: Run, llama: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch import nn

    seen, original = set(), nn.functional.silu

    def silu(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if x.dim() == 3:  # not the probe of `fuse`, in the first test of a process
            seen.add((x.dtype, x.requires_grad))
        return original(x, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "silu", silu)
    arguments = ("train", "-m", llama, "-d", reviews, "--eval-data", reviews, *METHOD, *STEPS)
    run(*arguments, "-o", tmp_path / "run", "--precision", "bf16", "--fuse", "off", "--without-logits", "off")
    assert (torch.bfloat16, True) in seen, "training computes in bf16"
    assert (torch.float32, False) in seen and (torch.bfloat16, False) not in seen, "measuring computes in fp32"
    found = result_of(tmp_path / "run")
    shown = run("eval", tmp_path / "run", "-d", reviews).output
    assert f"{found['before']['loss']:.4f}" in shown and f"{found['after']['loss']:.4f}" in shown
    monkeypatch.undo()
    run(*arguments, "-o", tmp_path / "fp32", "--precision", "fp32")
    assert result_of(tmp_path / "fp32")["after"]["loss"] == pytest.approx(found["after"]["loss"], rel=0.02)
    assert result_of(tmp_path / "fp32")["after"]["loss"] != found["after"]["loss"]
