"""Config fields that choose layers, for methods to inherit."""

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
LEFT_OUT = 0.1  # share of the weight selected by `all-linear`; misfits with more are an error


@dataclass(frozen=True)
class LayersConfig:
    """Choice of the layers that a method adapts: linear ones, and those of `kinds`.

    The fields have the names of Hugging Face PEFT's configs.

    Args:
        target_modules, exclude_modules, layers_to_transform, layers_pattern: see `peftcore.model.targets.select`.
        modules_to_save: modules trained as a whole. None: a classifier's head, which pre-training did not train.
        fan_in_fan_out: written for PEFT, which needs True for GPT-2; peftcore reads the layout from the layer.
    """

    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None
    fan_in_fan_out: bool = False

    # Fields that PEFT's config of the method lacks. They are folded into target_modules, so that PEFT adapts the same
    # layers; a method has them in `PeftRules.own_fields`, too.
    not_in_peft: ClassVar[frozenset[str]] = frozenset()
    kinds: ClassVar[tuple[type[nn.Module], ...]] = ()  # other layers that the method adapts if they are named

    def __post_init__(self) -> None:
        check_types(self)
        counted = self.layers_pattern is None or self.layers_to_transform is not None
        require(
            counted, "layers_pattern says where layers are counted: name some in layers_to_transform, or leave it out"
        )

    def selected(self, model: nn.Module, architecture: Architecture) -> dict[str, nn.Module]:
        """Return the selected layers by path.

        `all-linear` leaves out misfits with little of the weight, such as gates with one row, and warns.

        Raises:
            PeftcoreError: a named layer, or much of the weight, does not fit the config.
        """
        chosen = select_by(self, model, architecture, supported=self.adapts)
        unfit = {path: why for path, module in chosen.items() if (why := self.misfit(path, module)) is not None}
        if not unfit:
            return chosen
        first, why = next(iter(unfit.items()))
        total = sum(math.prod(sizes(module)) for module in chosen.values())
        share = sum(math.prod(sizes(chosen[path])) for path in unfit) / total
        if self.target_modules != ALL_LINEAR or share > LEFT_OUT:
            raise PeftcoreError(why)
        warn(
            f"target_modules='{ALL_LINEAR}' leaves out {len(unfit)} layers ('{first}'), {100 * share:.2g} % of the "
            f"weight, which do not fit: {why}",
        )
        return {path: module for path, module in chosen.items() if path not in unfit}

    def adapts(self, module: nn.Module) -> bool:
        """Return whether the method can adapt layers of this class."""
        return is_linear(module) or isinstance(module, self.kinds)

    def misfit(self, path: str, module: nn.Module) -> str | None:
        """Return the error for a layer whose sizes the fields do not fit, or None; for methods to override."""
        return None

    def resolved(self: Config, model: nn.Module, architecture: Architecture) -> Config:
        """Return the config with model-dependent choices made explicit, so that its meaning is fixed when saved."""
        chosen = self.selected(model, architecture)
        choices = ("exclude_modules", "layers_to_transform", "layers_pattern")
        folded = {n: None for n in choices if n in self.not_in_peft and getattr(self, n) is not None}
        by_layer = isinstance(self.target_modules, str) and self.layers_to_transform is not None  # PEFT refuses both
        every = self.target_modules == ALL_LINEAR or by_layer or bool(folded)
        names = minimal_suffixes(model, chosen) if every else self.target_modules
        transposed = "fan_in_fan_out" not in self.not_in_peft and any(map(is_conv1d, chosen.values()))
        return replace(self, target_modules=names, fan_in_fan_out=transposed, **folded)
