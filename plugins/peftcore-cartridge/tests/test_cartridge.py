"""Cartridges: files to and from Hugging Face PEFT, the frozen tokens, and the start from a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from support import tiny
from support.against_peft import TASKS, both_ways

import peftcore


@pytest.mark.parametrize("kind", [kind for kind in tiny.MODELS if kind != "bert"])  # PEFT refuses encoders
@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_files(kind: str, frozen: int, tmp_path: Path) -> None:
    fields = {"num_virtual_tokens": 4, "num_frozen_tokens": frozen}
    model = peftcore.apply(tiny.MODELS[kind](), "cartridge", **fields)
    both_ways(tiny.MODELS[kind], tmp_path, model, peft.CartridgeConfig(task_type=TASKS[kind], **fields))
    assert list(load_file(tmp_path / "ours" / "adapter_model.safetensors"))[-1] == "prompt_embeddings"


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_it_starts_as_if_the_text_were_there(make: Any) -> None:
    text, tokens = torch.arange(20, 26)[None], tiny.TOKENS
    model = peftcore.apply(make(), "cartridge", num_virtual_tokens=6, batches=[{"input_ids": text}])
    with torch.no_grad():
        actual = model(input_ids=tokens).logits
        expected = make()(input_ids=torch.cat([text.expand(len(tokens), -1), tokens], dim=1)).logits[:, 6:]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_the_first_tokens_stay() -> None:
    model = peftcore.apply(tiny.llama(), "cartridge", num_virtual_tokens=5, num_frozen_tokens=2)
    sizes = [p.shape[0] for p in model.parameters() if p.requires_grad]
    assert sizes == [3]


def test_what_does_not_fit_is_refused() -> None:
    def assert_refused(match: str, make: Any = tiny.llama, **fields: Any) -> None:
        with pytest.raises(peftcore.PeftcoreError, match=match):
            peftcore.apply(make(), "cartridge", **fields)

    assert_refused("must leave a token to train, found 4 of 4", num_virtual_tokens=4, num_frozen_tokens=4)
    assert_refused(
        "starts from input_ids with at least 20 tokens", batches=[{"input_ids": torch.zeros(1, 3, dtype=torch.long)}]
    )
    text = torch.arange(20, 30)[None]
    batches = [{"input_ids": text}]
    assert_refused("returns no cache to start from", tiny.bert_classifier, num_virtual_tokens=4, batches=batches)
    assert_refused("batches only work with decoders", tiny.t5, num_virtual_tokens=4, batches=[{"input_ids": text}])
