"""HiRA of convolutions and embeddings: files to and from PEFT, merged, dropped inputs, errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support import tiny
from support.against_peft import Layer, both_ways, quiet, same_layer
from torch import nn

import peftcore
from peftcore.plugin import disturb
from peftcore.testing.families import FAMILIES

IDS = torch.tensor([[1, 2, 3, 5], [4, 19, 0, 5]])
LAYERS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "Conv1d": (lambda: nn.Conv1d(8, 6, 3, padding="same", dilation=2), torch.randn(2, 8, 9)),
    "Conv2d": (lambda: nn.Conv2d(8, 6, (3, 1), stride=(2, 1), padding=1, bias=False), torch.randn(2, 8, 7, 6)),
    "Conv2d of one number": (lambda: nn.Conv2d(8, 6, 1), torch.randn(2, 8, 7, 6)),
    "Conv3d": (lambda: nn.Conv3d(8, 6, 2), torch.randn(2, 8, 3, 4, 3)),
    "Embedding": (lambda: nn.Embedding(20, 8, padding_idx=0), IDS),
}


@pytest.mark.parametrize("start", [True, False, "gaussian"])
@pytest.mark.parametrize("kind", LAYERS)
def test_files(kind: str, start: Any, tmp_path: Path) -> None:
    make, x = LAYERS[kind]
    fields = {"r": 4, "init_weights": start}
    same_layer(make, x, tmp_path, peft.HiraConfig(target_modules=["layer"], **fields), "hira", **fields)


def test_embedding_of_a_model(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"target_modules": ["embed_tokens", "q_proj"], "r": 4}
    model = peftcore.apply(tiny.llama(), "hira", **fields)
    both_ways(tiny.llama, tmp_path, model, peft.HiraConfig(task_type="CAUSAL_LM", **fields))


def test_inputs_of_a_convolution_are_dropped_in_training() -> None:
    model, x = Layer(nn.Conv2d(8, 6, 3)), torch.randn(1, 8, 3, 3)
    plain = model(x).detach()
    disturb(peftcore.apply(model, "hira", target_modules=["layer"], r=2, hira_dropout=0.5), "default", seed=1)
    model.train()
    mean = torch.stack([model(x).detach() for _ in range(400)]).mean(0) - plain
    added = model.eval()(x).detach() - plain
    assert (model.train()(x).detach() - plain - added).abs().max() > 0.1 * added.abs().max()
    torch.testing.assert_close(mean, added, rtol=0, atol=0.3 * added.abs().max().item())


def test_shares_of_an_embedding_s_entries_are_mixed() -> None:
    from transformers.models.ovis2.modeling_ovis2 import Ovis2VisualEmbeddingTable

    torch.manual_seed(0)
    model, shares = Layer(Ovis2VisualEmbeddingTable(20, 8)), torch.randn(2, 4, 20).softmax(-1)
    disturb(peftcore.apply(model, "hira", target_modules=["layer"], r=2), "default", seed=1)
    expected = model(shares).detach()
    torch.testing.assert_close(peftcore.merge(model, undo=True)(shares), expected)
    assert (peftcore.unmerge(model)(shares) - shares @ model.layer.weight).abs().max() > 0.01


def test_ranks_that_peft_wrote_and_did_not_use_are_refused(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"target_modules": ["embed_tokens"], "r": 4, "rank_pattern": {"embed_tokens": 2}}
    peft_model = quiet(peft.get_peft_model, tiny.llama(), peft.HiraConfig(**fields))
    quiet(peft_model.save_pretrained, tmp_path)
    with pytest.raises(peftcore.PeftcoreError, match=r"Remove it from adapter_config\.json"):
        peftcore.load(tiny.llama(), tmp_path)


def test_what_peft_computes_otherwise_is_refused() -> None:
    for layer, message in (
        (nn.Conv2d(8, 6, 3, groups=2), "in 2 groups, where PEFT fails or computes something else"),
        (nn.Embedding(20, 8, max_norm=1.0), r"'layer' \(Embedding\) does more than look up its input, so"),
    ):
        with pytest.raises(peftcore.PeftcoreError, match=message):
            peftcore.apply(Layer(layer), "hira", target_modules=["layer"])
    with pytest.raises(peftcore.PeftcoreError, match="multiplies its output by embed_scale, which PEFT does not"):
        peftcore.apply(FAMILIES["Gemma"].make(), "hira", target_modules=["embed_tokens"])
