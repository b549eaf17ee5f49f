"""The fields by which a config chooses linear layers, for methods to inherit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import nn

from peftcore.architecture import Architecture
from peftcore.layers import is_conv1d
from peftcore.targets.experts import ALL_LINEAR
from peftcore.targets.selection import minimal_suffixes, select_by
from peftcore.validation import check_types

Config = TypeVar("Config", bound="LayersConfig")


@dataclass(frozen=True)
class LayersConfig:
    """Which linear layers a method adapts. The fields bear the names of Hugging Face PEFT's configs.

    Args:
        target_modules, exclude_modules, layers_to_transform, layers_pattern: see `peftcore.targets.select`.
        modules_to_save: modules trained whole. None: a classifier's head, which pre-training did not train.
        fan_in_fan_out: written for PEFT, which wants it True for GPT-2; here a layer's layout is read off the layer.
    """

    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        check_types(self)

    def selected(self, model: nn.Module, architecture: Architecture) -> dict[str, nn.Module]:
        """The layers that are meant, by path."""
        return select_by(self, model, architecture)

    def resolved(self: Config, model: nn.Module, architecture: Architecture) -> Config:
        """The choices that depend on the model made explicit, so that a saved config means the same anywhere."""
        chosen = self.selected(model, architecture)
        every = self.target_modules == ALL_LINEAR
        names = minimal_suffixes(model, chosen) if every else self.target_modules
        return replace(self, target_modules=names, fan_in_fan_out=any(map(is_conv1d, chosen.values())))
