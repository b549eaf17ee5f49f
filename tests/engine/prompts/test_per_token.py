"""Inputs that have a box or a mask of images for each token: those of a soft prompt are zero."""

from __future__ import annotations

import pytest
import torch
from census import instances
from torch import Tensor

import peftcore
from peftcore.engine import adapter_parameters
from peftcore.engine.prompts.soft_prompt import SoftPromptAround

BATCH, LENGTH, N = 2, 6, 3
TOKEN = 40


@pytest.mark.parametrize(
    ("name", "argument", "size"),
    [
        ("LayoutLMModel", "bbox", 4),
        ("BrosModel", "bbox", 8),
        ("IdeficsModel", "image_attention_mask", 1),
        ("TapasModel", "token_type_ids", 7),
    ],
)
def test_a_prompt_of_a_token_is_that_token(name: str, argument: str, size: int) -> None:
    model = instances.build(name)
    torch.manual_seed(0)
    tokens = torch.arange(50, 50 + BATCH * LENGTH).view(BATCH, LENGTH)
    per_token = torch.randint(1, 9, (BATCH, LENGTH, size)).sort(-1).values
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, :2] = 0
    if argument != "bbox":
        per_token = per_token.clamp(max=1)
    others = {"pixel_values": torch.randn(BATCH, 1, 3, 64, 64)} if name == "IdeficsModel" else {}

    def run(tokens: Tensor, per_token: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            values = per_token.float() if name == "BrosModel" else per_token
            return model(input_ids=tokens, attention_mask=mask, **{argument: values}, **others)[0]

    def grown(values: Tensor, own: Tensor) -> Tensor:
        """Behind each row's padding."""
        return torch.stack([torch.cat([row[:at], own, row[at:]]) for row, at in zip(values, (0, 2), strict=True)])

    ones = torch.ones(N, dtype=torch.long)
    wanted = run(grown(tokens, TOKEN * ones), grown(per_token, ones.new_zeros(N, size)), grown(mask, ones))
    peftcore.apply(model, "prompt-tuning", num_virtual_tokens=N)
    vectors = next(iter(dict(adapter_parameters(model, "default")).values()))
    with torch.no_grad():
        vectors.copy_(model.get_input_embeddings().weight[TOKEN])
    found = run(tokens, per_token, mask)
    torch.testing.assert_close(found[0], wanted[0, N:], rtol=0, atol=1e-4)
    torch.testing.assert_close(found[1, 2:], wanted[1, 2 + N :], rtol=0, atol=1e-4)


def test_what_is_of_images_is_left_alone_where_its_sizes_are_those_of_tokens() -> None:
    """Two images of 2 numbers each beside two rows of 2 tokens."""
    model = instances.build("LlavaNextModel")
    peftcore.apply(model, "prompt-tuning", num_virtual_tokens=N)
    around = next(module for module in model.modules() if isinstance(module, SoftPromptAround))
    two = torch.ones(2, 2, dtype=torch.long)
    call = {"input_ids": two, "image_sizes": two, "token_type_ids": two, "attention_mask": two}
    around._grow(call, None)
    sizes = {name: value.shape[1] for name, value in call.items()}
    assert sizes == {"input_ids": 2, "image_sizes": 2, "token_type_ids": 2 + N, "attention_mask": 2}
