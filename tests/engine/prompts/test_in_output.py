"""A soft prompt that stays in the output: what the model gives at its places stands before the input's."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import tiny
from support.prompted import N, gemma3
from support.tiny import TOKENS
from torch import Tensor, nn

import peftcore
from peftcore.plugin import Adapter, Architecture, SoftPrompt, current_call


class Kept(Adapter):
    """Random vectors, whose outputs the call asks for."""

    needs_call = ("whole",)
    tokens = N

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.vectors = nn.Parameter(torch.randn(N, hidden))

    def forward(self) -> Tensor:
        return self.vectors

    def in_output(self) -> bool:
        return bool(current_call().get("whole"))


def place(model: nn.Module, config: Any, architecture: Architecture) -> list[SoftPrompt]:
    return [SoftPrompt(Kept(architecture.hidden_size or 0), (N, architecture.hidden_size or 0))]


@pytest.fixture(autouse=True)
def toy() -> Iterator[None]:
    with tiny.installed(tiny.method("kept", place)):
        yield


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, gemma3])
def test_its_outputs_come_first(make: Any) -> None:
    torch.manual_seed(1)
    model = peftcore.apply(make(), "kept")
    vectors = next(module for module in model.modules() if isinstance(module, Kept)).vectors
    embedded = model.get_input_embeddings()(TOKENS)
    with torch.no_grad():
        found, cut = model(TOKENS, whole=True).logits, model(TOKENS).logits
        rows = torch.cat([vectors.expand(len(TOKENS), -1, -1), embedded], dim=1)
        with peftcore.disabled(model):
            wanted = model(inputs_embeds=rows).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(cut, wanted[:, N:], rtol=0, atol=1e-5)


def test_of_padded_rows_too() -> None:
    """In the order prompt, padding, input, though padding does not part them within the model."""
    torch.manual_seed(1)
    model, pad = peftcore.apply(tiny.llama(), "kept"), 2
    tokens = torch.cat([torch.zeros(len(TOKENS), pad, dtype=torch.long), TOKENS], dim=1)
    mask = torch.ones_like(tokens)
    mask[:, :pad] = 0
    with torch.no_grad():
        found = model(tokens, attention_mask=mask, whole=True).logits
        wanted = model(TOKENS, whole=True).logits
    torch.testing.assert_close(found[:, :N], wanted[:, :N], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[:, N + pad :], wanted[:, N:], rtol=0, atol=1e-5)
