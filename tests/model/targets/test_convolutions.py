"""What PEFT computes otherwise at a convolution is said, where the method asks for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from peftcore.model import targets


class Standardized(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight / self.weight.std(), self.bias)


OF_ALL = [
    (Standardized(4, 6, 3), "of class Standardized, which has a custom forward"),
    (nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), "with padding_mode='circular'"),
]
UNLESS_ALIKE = [
    (nn.Conv2d(4, 6, 3, dilation=2), "with dilation=(2, 2)"),
    (nn.Conv2d(4, 6, 3, padding="same"), "with stride=(1, 1) and padding='same'"),
    (nn.Conv2d(4, 6, 3, stride=(2, 1)), "with stride=(2, 1) and padding=(0, 0)"),
    (nn.Conv2d(4, 6, (3, 1)), "with kernel_size=(3, 1)"),
]
GROUPED = [(nn.Conv2d(4, 6, 3, groups=2), "in 2 groups")]


@pytest.mark.parametrize(
    ("layer", "why", "asked"),
    [*((*each, {}) for each in OF_ALL), *((*each, {"alike": True}) for each in UNLESS_ALIKE)]
    + [(*each, {"grouped": False}) for each in GROUPED],
)
def test_a_convolution_that_does_not_fit(layer: nn.Module, why: str, asked: dict[str, Any]) -> None:
    message = targets.odd_convolution("features.0", layer, **asked)
    assert message is not None and message.startswith(
        f"'features.0' is a convolution {why}, where PEFT fails or computes"
    )
    assert message.endswith("Exclude it: exclude_modules=['features.0']")


@pytest.mark.parametrize("layer", [each for each, _ in (*UNLESS_ALIKE, *GROUPED)])
def test_what_the_method_does_not_mind(layer: nn.Module) -> None:
    assert targets.odd_convolution("layer", layer) is None


@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 6), nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(4, 6, 1, dilation=2, padding_mode="reflect")]
)
def test_what_fits(layer: nn.Module) -> None:
    assert targets.odd_convolution("layer", layer, alike=True, grouped=False) is None


def test_sizes_are_those_of_the_weight_as_a_matrix() -> None:
    assert targets.sizes(nn.Conv2d(4, 6, (3, 2), groups=2)) == (12, 6)
    assert targets.sizes(nn.Conv1d(4, 6, 5)) == (20, 6)
    assert targets.sizes(nn.Embedding(20, 8)) == (20, 8)
