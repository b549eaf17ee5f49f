"""HRA of convolutions: files to and from PEFT, merged, errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.against_peft import Layer, quiet, same_layer
from torch import nn

import peftcore

IMAGE = torch.randn(2, 4, 7, 6)
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "of one number": lambda: nn.Conv2d(4, 6, 1, dilation=2),
    "of nine": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
}


@pytest.mark.filterwarnings("ignore:apply_GS=True. reflections do not cancel")
@pytest.mark.parametrize("fields", [{"r": 4}, {"r": 3, "apply_GS": True, "init_weights": False}], ids=["plain", "GS"])
@pytest.mark.parametrize("kind", LAYERS)
def test_files(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    config = peft.HRAConfig(target_modules=["layer"], **fields)
    same_layer(LAYERS[kind], IMAGE, tmp_path, config, "hra", **fields)


def test_biases(tmp_path: Path) -> None:
    config = quiet(peft.HRAConfig, target_modules=["layer"], bias="hra_only")
    same_layer(lambda: nn.Conv2d(4, 6, 3), IMAGE, tmp_path, config, "hra", bias="hra_only")


REFUSED = {
    "in 2 groups": lambda: nn.Conv2d(4, 6, 3, groups=2),
    r"with dilation=\(2, 2\)": lambda: nn.Conv2d(4, 6, 3, dilation=2),
    r"with stride=\(1, 2\) and padding=\(0, 0\)": lambda: nn.Conv2d(4, 6, 3, stride=(1, 2)),
    r"with stride=\(1, 1\) and padding='same'": lambda: nn.Conv2d(4, 6, 3, padding="same"),
    r"with kernel_size=\(3, 1\)": lambda: nn.Conv2d(4, 6, (3, 1)),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_peft_computes_otherwise_is_refused(why: str) -> None:
    with pytest.raises(
        peftcore.PeftcoreError, match=rf"'layer' is a convolution {why}, where PEFT fails or computes something"
    ):
        peftcore.apply(Layer(REFUSED[why]()), "hra", target_modules=["layer"])
