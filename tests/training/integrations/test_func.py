"""`torch.func`: gradients of each sample of a batch (differential privacy, influence), and along a direction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import tiny
from support.against_peft import quiet
from torch import Tensor, nn

import peftcore
from peftcore.testing import disturb

FIELDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "qlora": {"r": 4},
    "dora": {"r": 4},
    "ia3": {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "adapter": {},
    "bitfit": {"add_missing": True},
    "prompt-tuning": {"num_virtual_tokens": 2},
    "hra": {"r": 4},
}


@pytest.mark.parametrize("method", FIELDS)
def test_gradients_of_each_sample(method: str) -> None:
    model = quiet(peftcore.apply, tiny.llama(), method, **FIELDS[method])
    model.set_attn_implementation("eager")  # of the other, PyTorch has no batched form
    disturb(model, "default", seed=1)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    tokens = tiny.TOKENS

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        call = {"input_ids": sample[None], "labels": sample[None]}
        return torch.func.functional_call(model, parameters, (), call).loss

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(trained, tokens)
    for i, sample in enumerate(tokens):
        model.zero_grad()
        model(input_ids=sample[None], labels=sample[None]).loss.backward()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient[i], model.get_parameter(name).grad, rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by which PyTorch has some derivatives
def test_a_derivative_along_a_direction() -> None:
    model = quiet(peftcore.apply, tiny.llama(), "lora", r=4)
    model.set_attn_implementation("eager")
    disturb(model, "default", seed=1)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    direction = {name: torch.randn_like(p) for name, p in trained.items()}

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (tiny.TOKENS,)).logits

    wanted, found = torch.func.jvp(outputs, (trained,), (direction,))
    weights = torch.randn_like(wanted)
    (weights * model(tiny.TOKENS).logits).sum().backward()
    other = sum((model.get_parameter(name).grad * step).sum() for name, step in direction.items())
    torch.testing.assert_close((weights * found).sum(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_follows_vmap(randomness: str) -> None:
    layer = peftcore.apply(nn.Sequential(nn.Linear(64, 8)), "lora", r=4, target_modules=["0"], lora_dropout=0.5).train()
    disturb(layer, "default", seed=1)
    x = torch.randn(64).expand(5, 64)
    found = torch.func.vmap(layer, randomness=randomness)(x)
    assert all(torch.equal(row, found[0]) for row in found[1:]) == (randomness == "same")
