"""OFT of embeddings and of convolutions with a kernel of one number: files to and from PEFT, merged; COFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support import tiny
from support.against_peft import Layer, both_ways, moved, quiet, same_layer
from torch import nn

import peftcore
from peftcore.plugin import disturb

IDS, IMAGE = torch.tensor([[1, 2, 3, 5], [4, 19, 0, 5]]), torch.randn(2, 8, 4, 5)
LAYERS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "Conv2d": (lambda: nn.Conv2d(8, 6, 1, stride=2, padding=1), IMAGE),
    "Embedding": (lambda: nn.Embedding(20, 8, padding_idx=0), IDS),
}
FIELDS: tuple[dict[str, Any], ...] = (
    {"oft_block_size": 4},
    {"r": 2, "oft_block_size": 0, "block_share": True, "use_cayley_neumann": False, "init_weights": False},
    {"oft_block_size": 4, "coft": True, "eps": 0.9},
)


@pytest.mark.parametrize("fields", FIELDS, ids=["series", "shared", "within eps"])
@pytest.mark.parametrize("kind", LAYERS)
def test_files(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    make, x = LAYERS[kind]
    same_layer(make, x, tmp_path, peft.OFTConfig(target_modules=["layer"], **fields), "oft", **fields)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_embedding_of_a_model(kind: str, tmp_path: Path) -> None:
    names = {"llama": ["embed_tokens", "q_proj"], "t5": ["shared", "k"]}
    fields: dict[str, Any] = {"target_modules": names[kind], "oft_block_size": 8}
    make, task = tiny.MODELS[kind], {"llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}[kind]
    both_ways(make, tmp_path, peftcore.apply(make(), "oft", **fields), peft.OFTConfig(task_type=task, **fields))


def test_a_scaled_embedding(tmp_path: Path) -> None:
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

    fields = {"oft_block_size": 4}
    config = peft.OFTConfig(target_modules=["layer"], **fields)
    same_layer(lambda: BartScaledWordEmbedding(20, 8, 0, embed_scale=3.0), IDS, tmp_path, config, "oft", **fields)


def test_groups_are_turned_together_and_cannot_be_merged(tmp_path: Path) -> None:
    make = lambda: Layer(nn.Conv2d(8, 6, 1, groups=2)).eval()  # noqa: E731
    peft_model = moved(quiet(peft.get_peft_model, make(), peft.OFTConfig(target_modules=["layer"], oft_block_size=8)))
    quiet(peft_model.save_pretrained, tmp_path)
    model = peftcore.load(make(), tmp_path)
    torch.testing.assert_close(model(IMAGE), peft_model(IMAGE), rtol=0, atol=1e-5)
    with pytest.raises(
        peftcore.PeftcoreError, match=r"OFT rotates channels across the groups of a convolution .* cannot be merged"
    ):
        peftcore.merge(model, undo=True)


def test_coft_goes_on_from_where_it_was_brought_back_to() -> None:
    model = Layer(nn.Embedding(20, 8))
    peftcore.apply(model, "oft", target_modules=["layer"], oft_block_size=4, coft=True, eps=0.5)
    disturb(model, "default", seed=1, std=5.0)
    before = model(IDS).detach()
    peftcore.after_step(model, 1, 2)
    norms = 2**0.5 * model.layer.peftcore["default"].oft_embedding_R.weight.norm(dim=1)
    torch.testing.assert_close(norms, torch.full((2,), 0.5 / 2**0.5))
    torch.testing.assert_close(model(IDS), before)
