"""Hugging Face PEFT loads adapters saved here with the same logits, and vice versa."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from support import tiny
from support.against_peft import TASKS, both_ways, moved, quiet
from torch import Tensor, nn

import peftcore
from peftcore.plugin import disturb


class Attention(nn.Module):
    """A batch norm with statistics, and an attention that has a module inside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.attention = nn.BatchNorm1d(8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        output: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return output


X = torch.linspace(-2, 2, 80).sin().view(2, 5, 8)


@pytest.mark.parametrize("kind", list(tiny.MODELS))
def test_files(kind: str, tmp_path: Path) -> None:
    """All norms here, and the norms of PEFT's table or named ones in PEFT; a classifier's head in both."""
    model = peftcore.apply(tiny.MODELS[kind](), "ln-tuning")
    names = ["LayerNorm"] if kind == "bert" else None
    both_ways(tiny.MODELS[kind], tmp_path, model, peft.LNTuningConfig(task_type=TASKS[kind], target_modules=names))


def test_norms_with_statistics_are_left_alone() -> None:
    with pytest.raises(peftcore.PeftcoreError, match="target_modules"):
        peftcore.apply(tiny.batchnorm_net(), "ln-tuning")


def test_modules_with_modules_inside_and_buffers(tmp_path: Path) -> None:
    """PEFT copies them whole: parameters inside have names of their own, and statistics move with the copy."""
    config = peft.LNTuningConfig(target_modules=["norm", "attention"])
    peft_model = quiet(peft.get_peft_model, Attention(), config, adapter_name="mine")
    peft_model(X)  # moves the statistics
    expected = moved(peft_model.eval())(X)
    assert (expected - Attention().eval()(X)).abs().max() > 0.1
    quiet(peft_model.save_pretrained, tmp_path)
    model = peftcore.load(Attention(), tmp_path / "mine").eval()
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(peftcore.merge(model, undo=True)(X), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("named", [["norm", "attention"], r"attention|attention\.out_proj|norm"], ids=str)
def test_peft_reads_modules_with_modules_inside(named: str | list[str], tmp_path: Path) -> None:
    model = peftcore.apply(Attention(), "ln-tuning", target_modules=named).train()
    model(X)  # moves the statistics
    disturb(model, "default", seed=1)
    expected = model.eval()(X)
    assert (expected - Attention().eval()(X)).abs().max() > 0.1
    peftcore.save(model, tmp_path)
    peft_model = quiet(peft.PeftModel.from_pretrained, Attention(), tmp_path).eval()
    torch.testing.assert_close(peft_model(X), expected, rtol=0, atol=1e-5)
    assert torch.equal(peftcore.load(Attention(), tmp_path, trainable=True).eval()(X), expected)


@pytest.mark.parametrize("named", ["mlp", "layers.0"])
def test_blocks(named: str, tmp_path: Path) -> None:
    model = peftcore.apply(tiny.llama(), "ln-tuning", target_modules=[named])
    both_ways(tiny.llama, tmp_path, model, peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=[named]))
