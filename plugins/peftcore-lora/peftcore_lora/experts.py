"""Which experts `target_modules` means, and their ranks: what `LoraConfig.resolved` says by `target_parameters`."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from peftcore.plugin import targets, validation

if TYPE_CHECKING:
    from peftcore_lora.config import LoraConfig

CHOICE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")


def is_adaptable(module: nn.Module) -> bool:
    """Is it a layer that LoRA can adapt?"""
    others = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
    return targets.is_linear(module) or isinstance(module, others)


def with_experts(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The config with all experts that it means among target_parameters, and their ranks and scales in the patterns."""
    given, found = list(config.target_parameters or ()), reached(model, config)
    weights = {f"{path}.{name}": path for path, names in targets.expert_weights(model).items() for name in names}
    named = [name for name in weights if any(targets.matches(pattern, name) for pattern in given)]
    validation.require(
        config.expert_r is None or bool(found or named), f"expert_r={config.expert_r}: no weight of experts is reached"
    )
    ranks: dict[int, list[str]] = {}
    for name in dict.fromkeys([*found, *named]) if config.expert_r else (n for n in found if n not in named):
        share = config.r // targets.experts_per_token(model.get_submodule(weights[name]), model)
        ranks.setdefault(config.expert_r or max(1, share), []).append(name)
    rank_pattern, alpha_pattern = dict(config.rank_pattern), dict(config.alpha_pattern)
    for r, names in ranks.items():
        names = [name for name in names if r != config.r and not _pattern_of(config.rank_pattern, name)]
        rank_pattern |= dict.fromkeys(_suffixes(model, names), r)
        names = [name for name in names if not config.use_rslora and not _pattern_of(config.alpha_pattern, name)]
        alpha_pattern |= dict.fromkeys(_suffixes(model, names), config.lora_alpha * r / config.r)
    modules = targets.name_experts(model, config.target_modules, is_adaptable)[0] if found else config.target_modules
    return replace(
        config,
        target_modules=modules,
        target_parameters=list(dict.fromkeys([*given, *_suffixes(model, found)])),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        expert_r=None,
    )


def reached(model: nn.Module, config: LoraConfig) -> list[str]:
    """The full names of the experts' weights that target_modules means."""
    every = config.target_modules == targets.ALL_LINEAR
    if not config.reaches_experts or (every and config.target_parameters is not None):
        return []
    choice = {name: getattr(config, name) for name in CHOICE}
    found = targets.select_experts(model, supported=is_adaptable, **choice)
    if found and every and config.linear_alone:
        warnings.warn(f"{config.linear_alone} is known for linear layers: experts are left out", stacklevel=4)
        return []
    return found


def _pattern_of(patterns: dict[str, int] | dict[str, float], name: str) -> bool:
    return targets.pattern_value(patterns, name, None) is not None


def _suffixes(model: nn.Module, names: list[str]) -> list[str]:
    return targets.parameter_suffixes(model, names) if names else []
