"""Sparse gain: y = (1 + m g) · base(x) + m b, where training prunes most gains and shifts.

g, b [out]    trained, initially zero; b only if the layer has a bias, into which it merges
m [out]       mask: 1 for the outputs with the largest |g| over all layers, 0 for pruned outputs
schedule      the share of kept outputs falls linearly from 1 to `keep` until step `until` · total_steps
loss          penalty · mean of g²
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import peftcore
from peftcore.plugin import (
    Adapter,
    Architecture,
    Around,
    Base,
    Method,
    Placement,
    StateRules,
    hookimpl,
    override,
    targets,
)

peftcore_api = ">=3.0,<4"


@dataclass(frozen=True)
class SparseGainConfig:
    """Config of sparse gain.

    Args:
        target_modules: suffixes, a regular expression for whole paths, or all-linear.
        keep: share of all outputs that remain after pruning.
        until: share of the training steps after which pruning ends.
        penalty: factor of the mean of g² in the loss.
    """

    target_modules: str | list[str] = "all-linear"
    keep: float = 0.25
    until: float = 0.5
    penalty: float = 0.01

    def __post_init__(self) -> None:
        for name in ("keep", "until"):
            if not 0 < getattr(self, name) <= 1:
                raise peftcore.PeftcoreError(f"{name} must be above 0 and at most 1, found {getattr(self, name)}")
        if self.penalty < 0:
            raise peftcore.PeftcoreError(f"penalty must not be negative, found {self.penalty}")


class SparseGain(Adapter):
    """Gain g, shift b and mask m of one layer."""

    mask: Tensor

    def __init__(self, size: int, has_bias: bool) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(size))
        self.shift = nn.Parameter(torch.zeros(size)) if has_bias else None
        self.register_buffer("mask", torch.ones(size))

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        y = y * (1 + self.mask * self.gain).to(y.dtype)
        return y if self.shift is None else y + (self.mask * self.shift).to(y.dtype)

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        factor = 1 + self.mask * self.gain
        if bias is not None:
            bias = bias * factor
            bias = bias if self.shift is None else bias + self.mask * self.shift
        return weight * factor[:, None], bias


def place(model: nn.Module, config: SparseGainConfig, architecture: Architecture) -> list[Placement]:
    layers = targets.select(model, architecture, target_modules=config.target_modules)
    return [
        Around(path, SparseGain(targets.sizes(layer)[1], getattr(layer, "bias", None) is not None))
        for path, layer in layers.items()
    ]


def loss(adapters: Mapping[str, Any], config: SparseGainConfig) -> Tensor | None:
    gains = torch.cat([adapter.gain for adapter in adapters.values()])
    return config.penalty * gains.square().mean() if config.penalty else None


@torch.no_grad()
def after_step(adapters: Mapping[str, Any], config: SparseGainConfig, step: int, total_steps: int) -> None:
    progress = min(1.0, step / (config.until * total_steps))
    sizes = torch.cat([(adapter.mask * adapter.gain).abs() for adapter in adapters.values()])
    count = max(1, round(len(sizes) * (1 - (1 - config.keep) * progress)))
    limit = sizes.kthvalue(len(sizes) - count + 1)[0]
    for adapter in adapters.values():
        adapter.mask.copy_((adapter.mask * adapter.gain).abs() >= limit)


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(peft_type="SPARSE_GAIN")
    more: Any = {"loss": loss, "after_step": after_step, "learning_rate": 1e-3}
    return [Method("sparse-gain", SparseGainConfig, place, rules, **more)]
