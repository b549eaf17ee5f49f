"""BOFT of convolutions: files to and from PEFT, also products of rotations, merged; errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.boft import layer as peft_layer
from support.against_peft import Layer, same_layer
from torch import nn

import peftcore
from peftcore.plugin import disturb

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "of one number": lambda: nn.Conv2d(16, 6, 1),
    "of nine": lambda: nn.Conv2d(16, 6, 3, stride=2, padding=1, bias=False),
}
FIELDS: tuple[dict[str, Any], ...] = (
    {"boft_block_size": 4},
    {"boft_block_size": 0, "boft_block_num": 8, "boft_n_butterfly_factor": 2, "init_weights": False},
)


@pytest.mark.parametrize("fields", FIELDS, ids=["one rotation", "two"])
@pytest.mark.parametrize("kind", LAYERS)
def test_files(kind: str, fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # PEFT's products of several rotations need its CUDA kernel, which is compiled on machines with a card.
    block_diagonals = lambda blocks: [torch.stack([torch.block_diag(*each) for each in blocks])]  # noqa: E731
    monkeypatch.setattr(peft_layer, "_FBD_CUDA", SimpleNamespace(forward=block_diagonals))
    config = peft.BOFTConfig(target_modules=["layer"], **fields)
    same_layer(LAYERS[kind], torch.randn(2, 16, 7, 6), tmp_path, config, "boft", **fields)


def test_a_share_of_the_blocks_rests_in_training() -> None:
    model, x = Layer(nn.Conv2d(16, 6, 1)), torch.eye(16)[:, :, None, None]  # one channel each
    plain = model(x).detach()
    disturb(peftcore.apply(model, "boft", target_modules=["layer"], boft_dropout=0.5), "default", seed=1)
    torch.nn.init.ones_(model.layer.peftcore["default"].boft_s)
    rests = ((model.train()(x) - plain).abs().amax(dim=(1, 2, 3)) < 1e-6).view(4, 4)
    assert rests.all(1).sum() == 2 and rests.any(1).sum() == 2


def test_what_peft_computes_otherwise_is_refused() -> None:
    for layer, message in (
        (nn.Conv2d(4, 6, 3, groups=2), "in 2 groups, where PEFT fails or computes something else"),
        (nn.Conv2d(4, 6, 3, dilation=2), "with dilation=.* where PEFT fails or computes something else"),
        (nn.Conv2d(3, 6, 3), "boft_block_size=4 does not divide the 27 inputs of 'layer'"),
    ):
        with pytest.raises(peftcore.PeftcoreError, match=message):
            peftcore.apply(Layer(layer), "boft", target_modules=["layer"])
