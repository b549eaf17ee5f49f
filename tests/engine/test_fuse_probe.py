from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import peftcore
from peftcore import ops
from peftcore.engine.fuse_probe import difference_when_fused
from peftcore.engine.fusing import fused_modules

INPUTS = {"input_ids": tiny.TOKENS, "labels": tiny.TOKENS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_whose_gradients_are_the_same(dtype: torch.dtype) -> None:
    model = peftcore.fuse(peftcore.apply(tiny.llama(), "lora", r=4, lora_dropout=0.2).to(dtype)).eval()
    model.lm_head.train()
    state = torch.get_rng_state()
    assert difference_when_fused(model, INPUTS) is None
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())
    assert model.lm_head.training and not model.training and fused_modules(model)["RMSNorm"] == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_of_dropout_are_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = peftcore.fuse(peftcore.apply(tiny.bert_classifier(), "lora", r=4).to(dtype))
    inputs = {"input_ids": tiny.TOKENS, "labels": torch.zeros(len(tiny.TOKENS), dtype=torch.long)}
    assert fused_modules(model)["dropout"] > 0 and difference_when_fused(model, inputs) is None
    monkeypatch.setattr(ops, "dropout", lambda x, p: 2 * x)
    assert "the loss of a few rows differs" in str(difference_when_fused(model, inputs))


def test_gradients_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    model = peftcore.fuse(peftcore.apply(tiny.llama(), "lora", r=4))
    assert difference_when_fused(model, INPUTS) is None
    original = ops.gated

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 1.01 * grad

    monkeypatch.setattr(ops, "gated", lambda *args, **named: Wrong.apply(original(*args, **named)))  # type: ignore[no-untyped-call]
    found = str(difference_when_fused(model, INPUTS))
    assert "the loss of a few rows differs by 0.0e+00 with them, its gradient by" in found


def test_formulas_are_found_once_for_equal_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal code and settings; another epsilon, or a replaced forward, is another kind."""
    from peftcore.engine import fusing

    tried: list[Any] = []
    original = fusing.norm_formula
    monkeypatch.setattr(fusing, "norm_formula", lambda module: tried.append(module) or original(module))
    monkeypatch.setattr(fusing, "_found", {})
    model = peftcore.fuse(tiny.llama())
    norms = [module for module in tried if "Norm" in type(module).__name__]
    assert len(norms) == 1 and fused_modules(model) == {"RMSNorm": 5, "attention": 2, "gated MLP": 2}
    count = len(tried)
    peftcore.fuse(tiny.llama())
    assert len(tried) == count
    other: Any = tiny.llama()
    other.model.norm.variance_epsilon = 0.5
    peftcore.fuse(other)
    assert len(tried) == count + 1
    cls = type(tiny.llama().model.norm)
    with monkeypatch.context() as patched:
        patched.setattr(cls, "forward", lambda self, x: 2 * self.weight * x)
        assert fused_modules(peftcore.fuse(tiny.llama())) == {"attention": 2, "gated MLP": 2}
