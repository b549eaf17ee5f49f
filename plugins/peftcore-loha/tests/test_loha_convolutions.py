"""LoHa of convolutions: files to and from PEFT, merged, dropped outputs, errors."""

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
    "Conv1d": (lambda: nn.Conv1d(8, 6, 3, padding=1), SIGNAL),
    "Conv1d of one number": (lambda: nn.Conv1d(8, 6, 1), SIGNAL),
    "Conv1d, dilated, in groups": (lambda: nn.Conv1d(8, 6, 3, padding="same", dilation=2, groups=2), SIGNAL),
    "Conv2d": (lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1, bias=False), IMAGE),
    "Conv2d of one number": (lambda: nn.Conv2d(8, 6, 1), IMAGE),
    "Conv2d, oblong, dilated, in groups": (lambda: nn.Conv2d(8, 6, (3, 1), dilation=2, groups=2), IMAGE),
}
FIELDS: tuple[dict[str, Any], ...] = (
    {"r": 2, "alpha": 6},
    {"r": 3, "alpha": 6, "init_weights": False, "use_effective_conv2d": True},
)


@pytest.mark.parametrize("fields", FIELDS, ids=["a matrix", "with T"])
@pytest.mark.parametrize("kind", LAYERS)
def test_files(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    make, x = LAYERS[kind]
    same_layer(make, x, tmp_path, peft.LoHaConfig(target_modules=["layer"], **fields), "loha", **fields)


def test_channels_are_dropped_in_training_and_the_others_make_up_for_them() -> None:
    model, x = Layer(nn.Conv2d(4, 40, 3)), torch.randn(2, 4, 6, 6)
    plain = model(x).detach()
    torch.manual_seed(0)
    disturb(peftcore.apply(model, "loha", target_modules=["layer"], r=2, rank_dropout=0.5), "default", seed=1)
    delta, actual = model.eval()(x).detach() - plain, model.train()(x).detach() - plain
    dropped = (actual.abs() < 1e-6).all(dim=(0, 2, 3))
    assert 0 < dropped.sum() < 40
    scale = 40 / (40 - dropped.sum())
    torch.testing.assert_close(actual[:, ~dropped], scale * delta[:, ~dropped], rtol=0, atol=1e-5)


@pytest.mark.parametrize("fields", FIELDS, ids=["a matrix", "with T"])
def test_it_becomes_a_lora(fields: dict[str, Any]) -> None:
    model = Layer(nn.Conv2d(8, 6, 3))
    disturb(peftcore.apply(model, "loha", target_modules=["layer"], **fields), "default", seed=1)
    expected = model(IMAGE).detach()
    peftcore.convert(model, "default", method="lora", r=6, adapter="thin")
    peftcore.activate(model, ["thin"])
    torch.testing.assert_close(model(IMAGE).detach(), expected, rtol=0, atol=1e-4)


class Standardized(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight / self.weight.std(), self.bias)


def test_what_peft_computes_otherwise_is_refused(tmp_path: Path) -> None:
    for layer, message in (
        (nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"), "with padding_mode='reflect', where PEFT"),
        (Standardized(8, 6, 3), "of class Standardized, which has a custom forward, where PEFT"),
        (nn.Conv3d(8, 6, 1), "'layer' matches Conv3d .* which this method cannot adapt"),
    ):
        with pytest.raises(peftcore.PeftcoreError, match=message):
            peftcore.apply(Layer(layer), "loha", target_modules=["layer"])


def test_padding_of_nothing_may_be_of_any_mode() -> None:
    peftcore.apply(Layer(nn.Conv2d(8, 6, 1, padding_mode="reflect")), "loha", target_modules=["layer"])
