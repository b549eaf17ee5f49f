"""TinyLoRA (Morris et al. 2026, arXiv 2602.04118): y = W x + B R A x + b, with R = Σ_i v_i P_i.

    W ≈ B A             from the r largest singular values: B = U sqrt(S) and A = sqrt(S) V, frozen
    P_i [r, r]          u random matrices of a layer, frozen
    v [u]               trained, zero at the start; one per layer, or per group of layers (weight_tying)

With weight_tying=1 and u=13 a whole model has thirteen trained numbers. For an embedding W is [tokens, width].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peftcore_lora.layers import LowRankLinear
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore import plugin
from peftcore.plugin import (
    Adapter,
    Architecture,
    Around,
    Base,
    Method,
    PeftRules,
    Placement,
    StateRules,
    hookimpl,
    inside_at,
    odd_embedding,
    targets,
    validation,
)

peftcore_api = ">=3.0,<4"


@dataclass(frozen=True)
class TinyLoraConfig(targets.LayersConfig):
    """Config with the field names of Hugging Face PEFT's `TinyLoraConfig`; the other fields are LoRA's.

    Args:
        r: number of singular vectors; a smaller weight uses all it has.
        u: length of v.
        weight_tying: 0: each layer has its own v. 1: all layers share one. Between: groups of consecutive layers share
            one.
        projection_seed: seed of P.
        save_projection: save P; otherwise loading draws it again.
        init_weights: True: v is zero. "uniform", or False (uninitialised in PEFT): v is within init_v_bound of zero.
    """

    r: int = 2
    u: int = 64
    weight_tying: float = 0.0
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: float = 0.02
    tinylora_dropout: float = 0.0
    bias: Literal["none", "all", "tinylora_only"] = "none"
    init_weights: bool | Literal["uniform"] = True

    not_in_peft = frozenset({"exclude_modules"})
    kinds = (nn.Embedding,)

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.positive_whole(r=self.r, u=self.u)
        validation.probability(tinylora_dropout=self.tinylora_dropout)
        tying = self.weight_tying
        validation.require(0 <= tying <= 1, f"weight_tying must be in [0, 1], found {tying}")

    def misfit(self, path: str, module: nn.Module) -> str | None:
        return odd_embedding(path, module)


class Group(nn.Module):
    """v of one group of layers; `number` is its name in the file."""

    def __init__(self, config: TinyLoraConfig, number: int) -> None:
        super().__init__()
        self.number, bound = number, config.init_v_bound
        values = torch.zeros(config.u)
        self.v = nn.Parameter(values if config.init_weights is True else values.uniform_(-bound, bound))


class TinyLora(LowRankLinear):
    """Frozen A `[r, in]`, B `[out, r]` and P `[u, r, r]` of a layer, whose `index` is added to P's seed."""

    tinylora_A: Tensor
    tinylora_B: Tensor
    tinylora_P: Tensor

    def __init__(self, config: TinyLoraConfig, group: Group, index: int, width: int, out_width: int) -> None:
        super().__init__(dropout=config.tinylora_dropout)
        self.group = group
        r = min(config.r, width, out_width)
        p = torch.empty(config.u, r, r)
        if not p.is_meta:  # drawn on the CPU, as in PEFT
            generator = torch.Generator("cpu").manual_seed(config.projection_seed + index)
            p = torch.normal(0.0, r**-0.5, p.shape, generator=generator, device="cpu")
        self.register_buffer("tinylora_A", torch.zeros(r, width))
        self.register_buffer("tinylora_B", torch.zeros(out_width, r))
        self.register_buffer("tinylora_P", p, persistent=config.save_projection)

    def extra_repr(self) -> str:
        return f"r={len(self.tinylora_A)}, u={len(self.tinylora_P)}, group={self.group.number}"

    def pair(self) -> tuple[Tensor, Tensor]:
        v = self.group.v.to(self.tinylora_P.device)
        return self.tinylora_A, self.tinylora_B @ torch.einsum("i,ijk->jk", v, self.tinylora_P)


class TinyLoraEmbedding(TinyLora):
    """A `[r, width]` and B `[tokens, r]` of an embedding, which looks up rows of B."""

    per_sample = staticmethod(Adapter.per_sample)  # LoRA's version only handles linear layers

    def forward(self, base: Base, tokens: Tensor) -> Tensor:
        if tokens.is_floating_point():  # weights of a mixture of rows, as in Ovis
            output: Tensor = base.on_weights({"weight": lambda weight: self.merged(weight, None)[0]})(tokens)
            return output
        y, (a, b) = base(tokens), self.pair()
        s = F.dropout(F.embedding(tokens, b), self.dropout.p, self.training)
        return y + (s @ a).to(y.dtype)


def place(model: nn.Module, config: TinyLoraConfig, architecture: Architecture) -> list[Placement]:
    layers = config.selected(model, architecture)
    count = max(1, round(len(layers) * (1 - config.weight_tying)))
    size = max(1, len(layers) // count)
    groups = [Group(config, number) for number in range(count)]
    placements: list[Placement] = []
    for index, (path, module) in enumerate(layers.items()):
        group = groups[min(index // size, count - 1)]
        width, out_width = targets.sizes(module)
        if isinstance(module, nn.Embedding):  # its weight is [tokens, width], a linear layer's [out, in]
            placements.append(Around(path, TinyLoraEmbedding(config, group, index, out_width, width)))
        else:
            placements.append(Around(path, TinyLora(config, group, index, width, out_width)))
    return [*placements, *targets.trained_biases(model, config.bias, layers)]


def initialize(model: nn.Module, adapters: Mapping[str, Any], config: TinyLoraConfig, batches: Any) -> None:
    """Set A and B from the singular value decomposition of the wrapped weight; the training batches are not used."""
    for path, adapter in adapters.items():
        r = len(adapter.tinylora_A)
        u, s, v = torch.linalg.svd(inside_at(model, path).weight().float(), full_matrices=False)
        adapter.tinylora_A.copy_(s[:r, None].sqrt() * v[:r])
        adapter.tinylora_B.copy_(u[:, :r] * s[:r].sqrt())


def tensor_name(placement: Any, name: str) -> str:
    """Name v by its group, since the file contains it once per group."""
    if name == "group.v":
        return f"base_model.tinylora_v.{placement.adapter.group.number}"
    return plugin.tensor_name(placement, name)


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(
        peft_type="TINYLORA", tensor_name=tensor_name, peft=PeftRules(own_fields=TinyLoraConfig.not_in_peft)
    )
    return [Method("tinylora", TinyLoraConfig, place, rules, initialize, learning_rate=3e-3)]
