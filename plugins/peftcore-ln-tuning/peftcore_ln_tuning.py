"""LN tuning (Zhao et al. 2023, arXiv 2312.11420): the gains and shifts of the norms are trained, nothing else.

    y = g ⊙ (x - mean x) / std x + b        g, b [hidden] of every LayerNorm; of an RMSNorm g

Trained: one or two vectors a norm. They merge by value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

import peftcore
from peftcore import targets, validation
from peftcore.adaptation.adapted import base_parameters
from peftcore.adaptation.class_swap import original_class

peftcore_api = 2

ALL_NORMS = "all-norms"


@dataclass(frozen=True)
class LNTuningConfig:
    """The fields bear the names of Hugging Face PEFT's `LNTuningConfig`.

    Args:
        target_modules: "all-norms": every norm without statistics of its own (LayerNorm, RMSNorm, GroupNorm); or ends
            of paths, or a regular expression for whole paths, of modules of any kind, which are trained whole.
        exclude_modules: the same, taken away from the selection.
        modules_to_save: modules trained whole. None: a classifier's head, which pre-training did not train.
    """

    target_modules: str | Sequence[str] = ALL_NORMS
    exclude_modules: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        validation.check_types(self)

    def resolved(self, model: nn.Module, architecture: peftcore.Architecture) -> LNTuningConfig:
        """The norms by name, so that a saved config means the same anywhere."""
        if self.target_modules != ALL_NORMS:
            return self
        named = targets.minimal_suffixes(model, selected(model, self, architecture))
        return LNTuningConfig(named, self.exclude_modules, self.modules_to_save)


def is_norm(module: nn.Module) -> bool:
    """A norm that keeps no statistics: one or two vectors of its own, and a class that is called so."""
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    is_one = original_class(module).__name__.rstrip("123d").endswith("Norm")
    return is_one and bool(own) and all(p.dim() == 1 for p in own) and not module._buffers and not module._modules


def selected(model: nn.Module, config: LNTuningConfig, architecture: peftcore.Architecture) -> dict[str, nn.Module]:
    """The modules that the config means, by path."""
    every = config.target_modules == ALL_NORMS
    chosen = targets.select(
        model,
        architecture,
        target_modules=".*" if every else config.target_modules,
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save,
        supported=is_norm if every else lambda module: next(base_parameters(module), None) is not None,
        own_parameters=True,
    )
    return chosen


def place(model: nn.Module, config: LNTuningConfig, architecture: peftcore.Architecture) -> list[peftcore.Train]:
    chosen = selected(model, config, architecture)
    return [peftcore.Train([f"{p}.{name}" for p, module in chosen.items() for name, _ in base_parameters(module)])]


def tensor_name(placement: Any, name: str) -> str:
    """PEFT keeps a trained copy of the whole module in `ln_tuning_layers`."""
    if placement.saved:  # a `Train`
        return peftcore.tensor_name(placement, name)
    path, _, parameter = name.rpartition(".")
    return peftcore.tensor_name(placement, f"{path}.ln_tuning_layers.{parameter}")


@peftcore.hookimpl
def peftcore_methods() -> list[peftcore.Method]:
    rules = peftcore.StateRules(peft_type="LN_TUNING", tensor_name=tensor_name)
    return [peftcore.Method("ln-tuning", LNTuningConfig, place, rules, learning_rate=1e-3)]
