"""VeRA (Kopiczko et al. 2023, arXiv 2310.11454): y = W x + b ⊙ B (d ⊙ A x), with random, frozen A and B.

Each layer trains b [out], zero at the start, and d [r]. All layers share A [r, widest in] and B [widest out, r]; each
uses as many columns of A and rows of B as it needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore import plugin
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
    validation,
)

peftcore_api = ">=3.0,<4"


@dataclass(frozen=True)
class VeraConfig:
    """Config with the field names of Hugging Face PEFT's `VeraConfig`.

    Args:
        r: rank of A and B. It costs only r parameters per layer, so it is larger than LoRA's.
        target_modules, layers_to_transform, layers_pattern: see `peftcore.plugin.targets.select`.
        projection_prng_key: seed of A and B.
        save_projection: save A and B; otherwise loading draws them again.
        vera_dropout: dropout probability of the inputs of A.
        d_initial: initial value of d (table 6c of the paper).
        bias: biases to train as well: "none", "all", or "vera_only" (of adapted modules).
        modules_to_save: modules to train in full as well. None means a classifier's head.
        init_weights: False: b is one and d random; the adapter then changes the model from the start.
        fan_in_fan_out: only written, for PEFT; peftcore reads the layout from the layer.
    """

    r: int = 256
    target_modules: str | Sequence[str] = targets.ALL_LINEAR
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "vera_only"] = "none"
    modules_to_save: Sequence[str] | None = None
    init_weights: bool = True
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        validation.check_types(self)
        validation.positive_whole(r=self.r)
        validation.probability(vera_dropout=self.vera_dropout)

    def resolved(self, model: nn.Module, architecture: Architecture) -> VeraConfig:
        """Return the config with the module names and the weights' layout filled in from the model."""
        layers, config = selected(model, self, architecture), self
        if self.target_modules == targets.ALL_LINEAR:
            config = replace(config, target_modules=targets.minimal_suffixes(model, layers))
        return replace(config, fan_in_fan_out=any(map(targets.is_conv1d, layers.values())))


class Projections(nn.Module):
    """A `[r, widest in]` and B `[widest out, r]`, one pair for all layers."""

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, config: VeraConfig, width: int, out_width: int) -> None:
        super().__init__()
        generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
        for name, shape in (("vera_A", (config.r, width)), ("vera_B", (out_width, config.r))):
            values = torch.empty(shape)
            # Drawn as in PEFT: Kaiming uniform, on the CPU.
            if not values.is_meta:
                bound = math.sqrt(6 / shape[1])
                values.copy_(torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator))
            self.register_buffer(name, values, persistent=config.save_projection)


class Vera(Adapter):
    """Trained b and d of a linear layer; x `[..., in]` -> y `[..., out]`."""

    def __init__(self, config: VeraConfig, projections: Projections, width: int, out_width: int) -> None:
        super().__init__()
        self.width, self.out_width, self.projections = width, out_width, projections
        self.dropout = nn.Dropout(config.vera_dropout)
        self.vera_lambda_b = nn.Parameter(torch.zeros(out_width) if config.init_weights else torch.ones(out_width))
        d = torch.full((config.r,), config.d_initial) if config.init_weights else torch.randn(config.r)
        self.vera_lambda_d = nn.Parameter(d)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y, (a, b) = base(x), self.sliced_projections(x.device, x.dtype)
        d, scale = self.vera_lambda_d.to(x.dtype), self.vera_lambda_b.to(x.dtype)
        return y + scale * F.linear(d * F.linear(self.dropout(x), a), b)

    def sliced_projections(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the slices of A and B that this layer uses."""
        a, b = self.projections.vera_A[:, : self.width], self.projections.vera_B[: self.out_width]
        return a.to(device, dtype), b.to(device, dtype)

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        a, b = self.sliced_projections(weight.device, weight.dtype)
        return weight + (self.vera_lambda_b.float()[:, None] * b) @ (self.vera_lambda_d.float()[:, None] * a), bias


def selected(model: nn.Module, config: VeraConfig, architecture: Architecture) -> dict[str, nn.Module]:
    """Return the selected linear layers by path."""
    fields = ("target_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    return targets.select(model, architecture, **{name: getattr(config, name) for name in fields})


def place(model: nn.Module, config: VeraConfig, architecture: Architecture) -> list[Placement]:
    layers = {path: targets.sizes(module) for path, module in selected(model, config, architecture).items()}
    projections = Projections(config, *(max(sizes) for sizes in zip(*layers.values(), strict=True)))
    placements: list[Any] = [Around(path, Vera(config, projections, *sizes)) for path, sizes in layers.items()]
    return placements + targets.trained_biases(model, config.bias, layers)


def tensor_name(placement: Any, name: str) -> str:
    """Name A and B without a layer, since the file contains them once."""
    if name.startswith("projections."):
        return f"base_model.{name.removeprefix('projections.')}"
    return plugin.tensor_name(placement, name)


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(peft_type="VERA", tensor_name=tensor_name)
    return [Method("vera", VeraConfig, place, rules, learning_rate=3e-2)]
