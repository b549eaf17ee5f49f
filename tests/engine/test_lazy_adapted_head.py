"""Lazy logits of a head with active adapters: pieces of rows go through the head with its adapters."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import tiny
import torch
from lazily import LABELS, same
from torch import Tensor, nn
from torch.nn import functional as F

import peftcore
from peftcore.engine.lazy_tensor import LazyLogits


def adapted_head(dtype: torch.dtype = torch.float32, quantized: bool = False, **options: object) -> nn.Module:
    method = str(options.pop("method", "lora"))
    model = tiny.llama().to(dtype)
    if quantized:
        peftcore.quantize(model, skip=[])
    peftcore.apply(model, method, r=4, target_modules=["q_proj", "lm_head"], **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model.train()


FLAT = LABELS.view(-1)
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: F.cross_entropy(x.view(-1, 96), FLAT),
    "sum": lambda x: F.cross_entropy((x * 0.5).tanh().mul(4).view(-1, 96), FLAT, reduction="sum"),
    "none": lambda x: F.cross_entropy(x.view(-1, 96), FLAT, reduction="none").square().sum(),
    "weights": lambda x: F.cross_entropy(
        x.view(-1, 96), FLAT, torch.linspace(0.1, 1, 96, dtype=x.dtype), label_smoothing=0.1
    ),
    "log-probabilities": lambda x: (x / 0.7).log_softmax(-1).gather(-1, tiny.TOKENS[..., None]).square().sum(),
    "nothing": lambda x: F.cross_entropy(x.view(-1, 96), torch.full((14,), -100), reduction="sum"),
}


@pytest.mark.parametrize("small_pieces", [False, True])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "4 bits", "bias"])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss: str, kind: str, small_pieces: bool, computed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    if small_pieces:
        module = sys.modules["peftcore.ops.head_cross_entropy"]  # the package has a function of this name
        monkeypatch.setattr(module, "rows_in_piece", lambda *_: 3)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    results = []
    for enabled in (False, True):
        model = adapted_head(dtype, kind == "4 bits", **({"lora_bias": True} if kind == "bias" else {}))
        peftcore.lazy_logits(model, enabled=enabled)
        logits = model(input_ids=tiny.TOKENS).logits
        assert (type(logits) is LazyLogits) == enabled
        found = LOSSES[loss](logits)
        found.backward()
        results.append((found.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert computed == [0] and "lm_head.peftcore.default.lora_A" in results[1][1]
    same(results[1], results[0], 2e-5 if dtype is torch.float32 else 6e-2)


def test_values_and_labels() -> None:
    model = adapted_head()
    wanted = model(input_ids=tiny.TOKENS, labels=LABELS)
    found = peftcore.lazy_logits(model)(input_ids=tiny.TOKENS, labels=LABELS)
    torch.testing.assert_close((found.loss, found.logits.argmax(-1)), (wanted.loss, wanted.logits.argmax(-1)))
    assert torch.equal(found.logits.detach(), wanted.logits.detach())
    with pytest.raises(IndexError, match="labels must be from 0 to 95"):
        F.cross_entropy(model(input_ids=tiny.TOKENS).logits.view(-1, 96), tiny.TOKENS.view(-1) + 90)


def test_adapters_changed_before_the_backward_pass() -> None:
    """A loss of each row multiplies again in backward: with the adapters of its forward pass."""
    model = peftcore.lazy_logits(adapted_head())
    wanted = []
    for change in (False, True):
        model.zero_grad()
        loss = LOSSES["none"](model(input_ids=tiny.TOKENS).logits)
        if change:
            peftcore.scale(model, "default", 3.0)
            with pytest.raises(peftcore.PeftcoreError, match="their scale or parameters were replaced"):
                loss.backward()
        else:
            loss.backward()
            wanted.append(model.lm_head.peftcore.default.lora_A.grad.clone())
    peftcore.scale(model, "default", 1.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    logits = model(input_ids=tiny.TOKENS).logits
    LOSSES["mean"](logits).backward()
    optimizer.step()
    with pytest.raises(peftcore.PeftcoreError, match="have changed since"):
        logits.sum()


def test_plain_logits_where_rows_depend_on_more() -> None:
    for options in ({"lora_dropout": 0.5}, {"method": "dora"}):
        model = peftcore.lazy_logits(adapted_head(**options))
        assert type(model(input_ids=tiny.TOKENS).logits) is Tensor
    model = peftcore.lazy_logits(adapted_head())
    with torch.autocast("cpu", torch.bfloat16):
        assert type(model(input_ids=tiny.TOKENS).logits) is Tensor
    with peftcore.disabled(model):
        model.get_input_embeddings().weight.requires_grad_()
        logits = model(input_ids=tiny.TOKENS).logits
    assert type(logits) is LazyLogits and logits.recipe.head.operands is not None


def test_parameters_of_a_functional_call() -> None:
    """They are the head's within the call: a loss computed there is right, and what is read later is an error."""
    results = []
    for enabled in (False, True):
        model = peftcore.lazy_logits(adapted_head(), enabled=enabled)
        given = {n: (p * 1.5).detach().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
        inputs = {"input_ids": tiny.TOKENS, "labels": LABELS}
        output = torch.func.functional_call(model, given, kwargs=inputs)
        output.loss.backward()
        results.append((output.loss.detach(), {name: p.grad for name, p in given.items() if p.grad is not None}))
    same(results[1], results[0], 2e-5)
    with pytest.raises(peftcore.PeftcoreError, match="their scale or parameters were replaced"):
        output.logits.sum()


def test_replicas_have_plain_logits() -> None:
    """As `nn.DataParallel` makes them, without parameters of their own."""
    model = peftcore.lazy_logits(adapted_head())
    replica = model.lm_head._replicate_for_data_parallel()
    for name, parameter in model.lm_head._parameters.items():
        setattr(replica, name, parameter)
    replica.peftcore = model.lm_head.peftcore
    hidden = torch.randn(2, 3, model.config.hidden_size, requires_grad=True)
    assert type(replica(hidden)) is Tensor and type(model.lm_head(hidden)) is LazyLogits
