"""BitFit of experts' biases `[experts, out]`, beside weights that are dense or in 4 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.mixtures import INPUTS, mixture
from torch import nn

import peftcore
from peftcore.engine import adapter_parameters
from peftcore.plugin import disturb


def gpt_oss(quantized: bool) -> nn.Module:
    model = mixture("gpt_oss")
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):
            nn.init.normal_(parameter, std=0.1)
    return peftcore.quantize(model) if quantized else model


@pytest.mark.parametrize("quantized", [False, True])
def test_experts_biases_are_trained_saved_merged_and_given_back(quantized: bool, tmp_path: Path) -> None:
    model = gpt_oss(quantized)
    before, base = model(**INPUTS).logits, {name: t.clone() for name, t in model.state_dict().items()}
    peftcore.apply(model, "bitfit")
    biases = {name: p for name, p in adapter_parameters(model, "default") if "experts" in name}
    assert {name.rpartition(".")[2] for name in biases} == {"gate_up_proj_bias", "down_proj_bias"}
    assert {tuple(p.shape) for p in biases.values()} == {(4, 128), (4, 64)} and len(biases) == 4

    optimizer, losses = torch.optim.SGD(biases.values(), lr=0.5), []
    for _ in range(3):
        loss = model(**INPUTS, labels=INPUTS["input_ids"]).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] > losses[1] > losses[2]
    acting = model(**INPUTS).logits
    peftcore.save(model, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(saved[f"base_model.model.{name}"], p) for name, p in biases.items())
    assert torch.equal(peftcore.load(gpt_oss(quantized), tmp_path)(**INPUTS).logits, acting)

    peftcore.merge(model, undo=True)
    assert torch.equal(model(**INPUTS).logits, acting)
    peftcore.unmerge(model)
    peftcore.remove(model)
    assert torch.equal(model(**INPUTS).logits, before)
    assert all(torch.equal(t, base[name]) for name, t in model.state_dict().items())


def test_the_gradient_of_experts_biases_is_that_of_their_own_forward() -> None:
    model, plain = gpt_oss(False), gpt_oss(False)
    peftcore.apply(model, "bitfit")
    disturb(model, "default", seed=1)
    biases = {name: p for name, p in adapter_parameters(model, "default") if "experts" in name}
    parameters = dict(plain.named_parameters())
    with torch.no_grad():
        for name, p in adapter_parameters(model, "default"):
            parameters[name].copy_(p)
    expected_gradients = torch.autograd.grad(
        plain(**INPUTS).logits.square().sum(), [parameters[name] for name in biases]
    )
    gradients = torch.autograd.grad(model(**INPUTS).logits.square().sum(), list(biases.values()))
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5)
