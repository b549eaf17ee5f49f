"""Images beside text: a soft prompt moves what is counted with the text, and nothing else."""

from __future__ import annotations

import pytest
import torch
from census import instances
from census.images import with_images
from census.prompts import generated

import peftcore
from peftcore.testing import disturb


@pytest.mark.parametrize("name", ["HunYuanVL", "Qwen2VL"])
def test_steps_behind_an_image(name: str) -> None:
    """HunYuan's images have coordinates of their own, which `generate` gives with the positions of text."""
    case = with_images(instances.build(f"{name}ForConditionalGeneration"))
    assert case is not None
    model = case.base
    peftcore.apply(model, "prompt-tuning", num_virtual_tokens=3)
    disturb(model, "default", 3)
    out = generated(model, case.inputs)
    new = torch.zeros_like(out.sequences)[:, -len(out.logits) :]
    types = torch.cat([case.inputs["mm_token_type_ids"], new], dim=1)
    tokens = {"input_ids": out.sequences, "attention_mask": torch.ones_like(types), "mm_token_type_ids": types}
    with torch.no_grad():
        wanted = model(**{**case.inputs, **tokens}).logits[:, -1 - len(out.logits) : -1]
    torch.testing.assert_close(torch.stack(out.logits, dim=1), wanted, rtol=0, atol=1e-4)
