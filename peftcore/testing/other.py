"""Method of the suite itself, to stack others on: y = gain · base(x) at every linear layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.engine import apply
from peftcore.model import targets
from peftcore.plugin.adapter import Adapter, Base
from peftcore.plugin.architecture import Architecture
from peftcore.plugin.hooks import hookimpl
from peftcore.plugin.method import Method, StateRules
from peftcore.plugin.placements.around import Around
from peftcore.plugin.registry import registry
from peftcore.testing.case import disturb

NAME = "the-suites-other"


@dataclass(frozen=True)
class OtherConfig:
    """Config of the other method, without fields."""


class Other(Adapter):
    """Gain for each output."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(size))

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        return y * self.gain.to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.gain[:, None], None if bias is None else bias * self.gain


def _place(model: nn.Module, config: OtherConfig, architecture: Architecture) -> list[Any]:
    layers = targets.select(model, architecture, target_modules=targets.ALL_LINEAR)
    return [Around(path, Other(targets.sizes(layer)[1])) for path, layer in layers.items()]


class _Plugin:
    @hookimpl
    def peftcore_methods(self) -> list[Method]:
        return [Method(NAME, OtherConfig, _place, StateRules(peft_type="THE_SUITES_OTHER"))]


@contextmanager
def other_method() -> Iterator[None]:
    """Register the other method within the block."""
    registry.register(NAME, _Plugin())
    try:
        yield
    finally:
        registry.unregister(NAME)


def add_other(model: nn.Module) -> None:
    """Apply the other method to `model` as the adapter `other`, with non-trivial values."""
    apply(model, OtherConfig(), adapter="other")
    disturb(model, "other", 3)
