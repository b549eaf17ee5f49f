"""A reference computes what the model computed when it was made, whatever its adapters have become since."""

from __future__ import annotations

import pytest
import torch
from support import quantized
from support.quantized import logits, moved

import peftcore

METHODS = {
    "lora": {"r": 2},
    "adapter": {},
    "bitfit": {"add_missing": True},
    "prompt-tuning": {"num_virtual_tokens": 3},
    "prefix-tuning": {"num_virtual_tokens": 3},
}


def model(method: str = "lora", *, loaded: bool = False, quantize: bool = False) -> torch.nn.Module:
    found = quantized.llama()
    if quantize:
        peftcore.quantize(found)
    torch.manual_seed(0)
    peftcore.apply(found, method, **METHODS[method])
    return moved(found) if loaded else found


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("method", list(METHODS))
def test_it_is_what_the_model_was(method: str, loaded: bool, quantize: bool) -> None:
    found = model(method, loaded=loaded, quantize=quantize)
    before = logits(found)
    reference = peftcore.reference_model(found)
    after = logits(moved(found))
    assert not torch.equal(after, before)
    torch.testing.assert_close(logits(reference), before)
    assert torch.equal(logits(found), after)
    assert (reference.copies is None) == (method == "lora" and not loaded)
    assert not list(reference.parameters())  # no second model


def test_the_base_as_reference() -> None:
    found = model(loaded=True)
    reference = peftcore.reference_model(found, base=True)
    assert reference.copies is None
    assert torch.equal(logits(reference), logits(quantized.llama()))
    assert not torch.equal(logits(reference), logits(found))


def test_what_changes_nothing_is_not_copied() -> None:
    """A trained parameter is compared with the base's, a change of a weight with that weight."""
    found = quantized.llama()
    peftcore.apply(found, "lora", r=2, modules_to_save=["lm_head"])
    assert peftcore.reference_model(found).copies is None
    with torch.no_grad():
        found.lm_head.weight[0, 0] += 1
    assert peftcore.reference_model(found).copies is not None


def test_a_frozen_adapter_below_stays() -> None:
    found = model(loaded=True)
    peftcore.engine.set_trainable(found, "default", False)
    before = logits(found)
    peftcore.apply(found, "lora", adapter="second", r=2)
    reference = peftcore.reference_model(found)
    moved(found)
    torch.testing.assert_close(logits(reference), before)
    peftcore.activate(found, "second")
    with pytest.raises(peftcore.PeftcoreError, match=r"made with adapters \['default', 'second'\] active, but"):
        logits(reference)


def test_gradients_and_optimizer_do_not_notice() -> None:
    found, twin = model(loaded=True), model(loaded=True)
    reference = peftcore.reference_model(found)
    for trained in (found, twin):
        optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            loss = trained(**quantized.INPUTS, labels=quantized.INPUTS["input_ids"]).loss
            if trained is found:
                logits(reference)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), twin.parameters(), strict=True))


def test_dropout_is_off_and_the_mode_of_the_model_stays() -> None:
    found = model("lora", loaded=True).train()
    found.config.attention_dropout = 0.5
    before = logits(found.eval())
    reference = peftcore.reference_model(found)
    found.train()
    assert torch.equal(reference(**quantized.INPUTS).logits, before)
    assert found.training and not reference.training


def test_values_outside_of_its_call_would_be_those_of_the_model_that_trains() -> None:
    found = model(loaded=True, method="lora")
    reference = peftcore.reference_model(found)
    assert reference.config is found.config and reference.dtype is torch.float32
    for name in ("model", "lm_head", "get_output_embeddings", "generate"):
        with pytest.raises(AttributeError, match=f"'{name}' of a reference model is only available during a call"):
            getattr(reference, name)
    found.lm_head.weight.requires_grad_(False)
    values = reference.state_dict()
    moved(found)
    assert all(torch.equal(value, values[name]) for name, value in reference.state_dict().items())


def test_merged_adapters_are_refused() -> None:
    found = peftcore.merge(model(loaded=True), undo=True)
    with pytest.raises(peftcore.PeftcoreError, match="adapters are merged into the base"):
        peftcore.reference_model(found)


@pytest.mark.parametrize("loaded", [False, True])
def test_statistics_that_training_moves(loaded: bool) -> None:
    torch.manual_seed(0)
    layers = (torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 3))
    found = peftcore.apply(torch.nn.Sequential(*layers), "lora", r=2, target_modules=["0", "2"])
    x = torch.randn(8, 4)
    if loaded:
        moved(found)(x + 1)
    before = found.eval()(x)
    reference = peftcore.reference_model(found)
    moved(found.train())(x + 2)
    assert not torch.allclose(found.eval()(x), before)
    torch.testing.assert_close(reference(x), before)
