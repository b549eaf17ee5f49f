"""LoKr of convolutions: files to and from PEFT, merged, dropped outputs, errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.against_peft import Layer, same_layer
from torch import nn

import peftcore
from peftcore.plugin import disturb

SIGNAL, IMAGE = torch.randn(2, 8, 9), torch.randn(2, 8, 7, 6)
LAYERS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "Conv1d": (lambda: nn.Conv1d(8, 12, 3, padding=1), SIGNAL),
    "Conv1d, dilated, in groups": (lambda: nn.Conv1d(8, 12, 3, padding="same", dilation=2, groups=2), SIGNAL),
    "Conv2d": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), IMAGE),
    "Conv2d of one number": (lambda: nn.Conv2d(8, 12, 1), IMAGE),
    "Conv2d, oblong, in groups": (lambda: nn.Conv2d(8, 12, (3, 1), dilation=2, groups=2), IMAGE),
}
FIELDS: dict[str, dict[str, Any]] = {
    "W2 whole": {"r": 8, "alpha": 6},  # of a Conv1d PEFT pairs it with W1 from the right
    "W2 a product": {"r": 1, "alpha": 6, "decompose_both": True, "decompose_factor": 2, "init_weights": "lycoris"},
    "W2 with T": {"r": 2, "alpha": 6, "decompose_factor": 2, "use_effective_conv2d": True, "init_weights": False},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("kind", LAYERS)
def test_files(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    make, x = LAYERS[kind]
    same_layer(make, x, tmp_path, peft.LoKrConfig(target_modules=["layer"], **fields), "lokr", **fields)


def test_channels_are_dropped_in_training() -> None:
    model, x = Layer(nn.Conv1d(4, 40, 3)), torch.randn(2, 4, 6)
    plain = model(x).detach()
    torch.manual_seed(0)
    disturb(peftcore.apply(model, "lokr", target_modules=["layer"], r=2, rank_dropout=0.5), "default", seed=1)
    delta, actual = model.eval()(x).detach() - plain, model.train()(x).detach() - plain
    dropped = (actual.abs() < 1e-6).all(dim=(0, 2))
    assert 0 < dropped.sum() < 40
    torch.testing.assert_close(actual[:, ~dropped], delta[:, ~dropped], rtol=0, atol=1e-5)


def test_what_peft_computes_otherwise_is_refused() -> None:
    with pytest.raises(peftcore.PeftcoreError, match="with padding_mode='circular', where PEFT"):
        layer = nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular")
        peftcore.apply(Layer(layer), "lokr", target_modules=["layer"])
