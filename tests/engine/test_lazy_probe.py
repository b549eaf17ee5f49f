from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from lazily import LABELS, adapted
from torch import Tensor, nn

import peftcore
from peftcore.engine import lazy_handlers
from peftcore.engine.lazy_head import has_lazy_logits
from peftcore.engine.lazy_probe import why_not_lazy

INPUTS = {"input_ids": tiny.TOKENS, "labels": LABELS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_whose_loss_is_the_same(dtype: torch.dtype, computed: list[int]) -> None:
    model = adapted(tiny.llama(), lora_dropout=0.2).to(dtype).eval()
    model.lm_head.train()
    state = torch.get_rng_state()
    assert why_not_lazy(model, INPUTS) is None
    assert computed == [0] and not has_lazy_logits(model)
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())
    assert model.lm_head.training and not model.training


def test_a_loss_that_reads_logits() -> None:
    model = adapted(tiny.llama())
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.logsumexp(-1).square().mean()
    assert why_not_lazy(model, INPUTS) == "its loss reads them, or no gradient passes the head"


def test_models_without_such_a_head() -> None:
    assert "has no linear head" in str(why_not_lazy(tiny.bert_classifier(), INPUTS))


def test_a_loss_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    original = lazy_handlers.HANDLERS[nn.functional.cross_entropy]

    def wrong(recipe: Any, args: Any, kwargs: Any) -> Tensor:
        loss: Tensor = original(recipe, args, kwargs)
        return loss * 1.01

    monkeypatch.setitem(lazy_handlers.HANDLERS, nn.functional.cross_entropy, wrong)
    model = adapted(tiny.llama())
    assert "the loss of a few rows differs by 1.0e-02 with them, its gradient by 1.0e-02" in str(
        why_not_lazy(model, INPUTS)
    )
    assert type(peftcore.lazy_logits(model, enabled=False).train()(**INPUTS).logits) is Tensor
