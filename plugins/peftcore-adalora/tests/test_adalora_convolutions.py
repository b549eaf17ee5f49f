"""AdaLoRA of convolutions: files to and from PEFT, merged; the schedule; errors."""

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

IMAGE = torch.randn(2, 8, 7, 6)
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "of one number": lambda: nn.Conv2d(8, 6, 1),
    "oblong, dilated": lambda: nn.Conv2d(8, 6, (3, 1), stride=2, padding=1, dilation=2, bias=False),
}


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_files(kind: str, start: bool, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"init_r": 4, "target_r": 2, "total_step": 10, "init_lora_weights": start}
    config = peft.AdaLoraConfig(target_modules=["layer"], **fields)
    same_layer(LAYERS[kind], IMAGE, tmp_path, config, "adalora", **fields)


def test_triplets_are_taken_away() -> None:
    torch.manual_seed(0)
    model = Layer(nn.Conv2d(8, 6, 3))
    peftcore.apply(model, "adalora", target_modules=["layer"], init_r=4, target_r=1, total_step=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(1, 5):
        optimizer.zero_grad()
        (model(IMAGE).square().mean() + peftcore.extra_loss(model)).backward()
        optimizer.step()
        peftcore.after_step(model, step, 4)
    assert int(model.layer.peftcore["default"].lora_E.count_nonzero()) == 1


def test_groups_are_refused() -> None:
    with pytest.raises(peftcore.PeftcoreError, match="in 2 groups, where PEFT fails or computes something"):
        peftcore.apply(Layer(nn.Conv2d(8, 6, 3, groups=2)), "adalora", target_modules=["layer"])
