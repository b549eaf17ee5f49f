"""Config fields that select layers, inherited by the configs of methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

from torch import nn

from peftcore.errors import PeftcoreError, warn
from peftcore.model.targets.expert_selection import ALL_LINEAR
from peftcore.model.targets.selection import minimal_suffixes, select_by
from peftcore.plugin.architecture import Architecture
from peftcore.plugin.layers import is_conv1d, is_linear, sizes
from peftcore.plugin.validation import check_types, require

Config = TypeVar("Config", bound="LayersConfig")
LEFT_OUT = 0.1  # fraction of the weights that `all-linear` may skip with a warning because they do not fit


@dataclass(frozen=True)
class LayersConfig:
    """Selects the layers that a method adapts: linear layers and the classes in `kinds`.

    The fields have the names of PEFT's config fields.

    Args:
        target_modules, exclude_modules, layers_to_transform, layers_pattern: see `peftcore.model.targets.select`.
        modules_to_save: modules to train as a whole. None for task heads, which pre-training did not train.
        fan_in_fan_out: only stored for PEFT, which needs True for GPT-2; peftcore detects the layout of a layer.
    """

    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None
    fan_in_fan_out: bool = False

    # Fields that PEFT's config of the method does not have. They are folded into target_modules, so that PEFT adapts
    # the same layers. The method also lists them in `PeftRules.own_fields`.
    not_in_peft: ClassVar[frozenset[str]] = frozenset()
    kinds: ClassVar[
        tuple[type[nn.Module], ...]
    ] = ()  # further classes of layers that the method adapts if they are named

    def __post_init__(self) -> None:
        check_types(self)
        is_consistent = self.layers_pattern is None or self.layers_to_transform is not None
        require(
            is_consistent,
            "layers_pattern has no effect without layers_to_transform. Set layers_to_transform, or leave "
            "layers_pattern out",
        )

    def selected(self, model: nn.Module, architecture: Architecture) -> dict[str, nn.Module]:
        """Return the selected layers by path.

        `all-linear` skips layers that do not fit the config, such as gates with one row, with a warning.

        Raises:
            PeftcoreError: a named layer does not fit the config, or `all-linear` would skip layers with a large
                fraction of the weights.
        """
        layers = select_by(self, model, architecture, supported=self.adapts)
        misfits = {path: reason for path, module in layers.items() if (reason := self.misfit(path, module)) is not None}
        if not misfits:
            return layers
        first_path, reason = next(iter(misfits.items()))
        total = sum(math.prod(sizes(module)) for module in layers.values())
        share = sum(math.prod(sizes(layers[path])) for path in misfits) / total
        if self.target_modules != ALL_LINEAR or share > LEFT_OUT:
            raise PeftcoreError(reason)
        warn(
            f"target_modules='{ALL_LINEAR}' leaves out {len(misfits)} layers ('{first_path}'), {100 * share:.2g} % of "
            f"the weights, which do not fit: {reason}",
        )
        return {path: module for path, module in layers.items() if path not in misfits}

    def adapts(self, module: nn.Module) -> bool:
        """Return whether the method can adapt layers of this class."""
        return is_linear(module) or isinstance(module, self.kinds)

    def misfit(self, path: str, module: nn.Module) -> str | None:
        """Return an error message if the sizes of a layer do not fit the fields, or None. Methods override it."""
        return None

    def resolved(self: Config, model: nn.Module, architecture: Architecture) -> Config:
        """Return the config with model-dependent values made explicit, so that a saved config has a fixed meaning."""
        layers = self.selected(model, architecture)
        choices = ("exclude_modules", "layers_to_transform", "layers_pattern")
        folded_fields = {n: None for n in choices if n in self.not_in_peft and getattr(self, n) is not None}
        by_layer = isinstance(self.target_modules, str) and self.layers_to_transform is not None  # PEFT refuses both
        must_list_names = self.target_modules == ALL_LINEAR or by_layer or bool(folded_fields)
        names = minimal_suffixes(model, layers) if must_list_names else self.target_modules
        transposed = "fan_in_fan_out" not in self.not_in_peft and any(map(is_conv1d, layers.values()))
        return replace(self, target_modules=names, fan_in_fan_out=transposed, **folded_fields)
