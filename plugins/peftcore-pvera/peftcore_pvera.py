"""PVeRA (arXiv 2512.07703): y = W x + b ⊙ B z, with z drawn around d ⊙ A x, and random A and B shared by all layers.

    (m, v) = d ⊙ A x          A [2 r, widest in], frozen; d [2 r], trained
    z = m + e · exp(v / 2)    e: normal noise in training, or always with sample_at_inference; otherwise 0
    y = W x + b ⊙ B z         B [widest out, r], frozen; b [out], trained, zero at the start

This is VeRA (`peftcore-vera`) with noise on the inner activations in training. Without noise it is a change of the
weight and can be merged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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
    Fields,
    Method,
    PeftRules,
    Placement,
    StateRules,
    Tensors,
    hookimpl,
    override,
    targets,
    validation,
    warn,
)

peftcore_api = ">=3.0,<4"


@dataclass(frozen=True)
class PveraConfig(targets.LayersConfig):
    """Config with the field names of Hugging Face PEFT's `PveraConfig`; the other fields are LoRA's.

    Args:
        r: rank of B.
        projection_prng_key: seed of A and B.
        save_projection: save A and B; otherwise loading draws them again.
        d_initial: initial value of d.
        init_weights: False: b is one and d random; the adapter then changes the model from the start.
        sample_at_inference: also draw z outside of training. Such an adapter cannot be merged.
    """

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    pvera_dropout: float = 0.0
    d_initial: float = 0.1
    bias: Literal["none", "all", "pvera_only"] = "none"
    init_weights: bool = True
    sample_at_inference: bool = False

    not_in_peft = frozenset({"exclude_modules"})

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.positive_whole(r=self.r)
        validation.probability(pvera_dropout=self.pvera_dropout)


class Projections(nn.Module):
    """A `[2 r, widest in]` and B `[widest out, r]`, one pair for all layers."""

    pvera_A: Tensor
    pvera_B: Tensor

    def __init__(self, config: PveraConfig, width: int, out_width: int) -> None:
        super().__init__()
        generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
        for name, shape in (("pvera_A", (2 * config.r, width)), ("pvera_B", (out_width, config.r))):
            values = torch.empty(shape)
            # Drawn as in PEFT: Kaiming uniform, on the CPU.
            if not values.is_meta:
                bound = math.sqrt(6 / shape[1])
                values.copy_(torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator))
            self.register_buffer(name, values, persistent=config.save_projection)


class Pvera(Adapter):
    """Trained b and d of a linear layer; x `[..., in]` -> y `[..., out]`."""

    def __init__(self, config: PveraConfig, projections: Projections, width: int, out_width: int) -> None:
        super().__init__()
        self.width, self.out_width, self.projections = width, out_width, projections
        self.dropout, self.always_draws = nn.Dropout(config.pvera_dropout), config.sample_at_inference
        self.pvera_lambda_b = nn.Parameter(torch.zeros(out_width) if config.init_weights else torch.ones(out_width))
        d = torch.full((2 * config.r,), config.d_initial) if config.init_weights else torch.randn(2 * config.r)
        self.pvera_lambda_d = nn.Parameter(d)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y, (a, b) = base(x), self.sliced_projections(x.device, x.dtype)
        d, scale = self.pvera_lambda_d.to(x.dtype), self.pvera_lambda_b.to(x.dtype)
        if self.training or self.always_draws:
            mean, log_variance = (d * F.linear(self.dropout(x), a)).chunk(2, dim=-1)
            z = mean + torch.randn_like(mean) * torch.exp(log_variance / 2)
        else:
            r = b.shape[1]
            z = d[:r] * F.linear(x, a[:r])
        return y + scale * F.linear(z, b)

    def sliced_projections(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the slices of A and B that this layer uses."""
        a, b = self.projections.pvera_A[:, : self.width], self.projections.pvera_B[: self.out_width]
        return a.to(device, dtype), b.to(device, dtype)

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        message = (
            "an adapter with sample_at_inference=True draws at every call, so it cannot be merged. "
            "Load it with sample_at_inference=False to merge the mean"
        )
        validation.require(not self.always_draws, message)
        a, b = self.sliced_projections(weight.device, weight.dtype)
        d = self.pvera_lambda_d.float()[: b.shape[1], None]
        return weight + (self.pvera_lambda_b.float()[:, None] * b) @ (d * a[: b.shape[1]]), bias


def place(model: nn.Module, config: PveraConfig, architecture: Architecture) -> list[Placement]:
    layers = {path: targets.sizes(module) for path, module in config.selected(model, architecture).items()}
    projections = Projections(config, *(max(sizes) for sizes in zip(*layers.values(), strict=True)))
    placements: list[Any] = [Around(path, Pvera(config, projections, *sizes)) for path, sizes in layers.items()]
    return placements + targets.trained_biases(model, config.bias, layers)


def tensor_name(placement: Any, name: str) -> str:
    """Name A and B without a layer, since the file contains them once."""
    if name.startswith("projections."):
        return f"base_model.{name.removeprefix('projections.')}"
    return plugin.tensor_name(placement, name)


def read(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    """Drop the seed of PEFT's own generator, whose noise changes when gradient checkpointing recomputes a layer."""
    if fields.get("generator_seed") is not None:
        warn("generator_seed is not used: the noise follows torch.manual_seed(...)")
    return tensors, {name: value for name, value in fields.items() if name != "generator_seed"}


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(
        peft_type="PVERA", tensor_name=tensor_name, read=read, peft=PeftRules(own_fields=PveraConfig.not_in_peft)
    )
    return [Method("pvera", PveraConfig, place, rules, learning_rate=3e-2)]
