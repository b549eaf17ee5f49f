"""Uni-LoRA (Li et al. 2025, arXiv 2506.00799): y = W x + B A x, where all A and B are read from one vector.

    theta [d] ------ P ------>  A, B of layer 1, A, B of layer 2, ...       D numbers

    Each row of P has one entry, 1 / sqrt(n_j) in a random column j that n_j rows share. P is an isometry, and each
    number of theta is used equally often.

theta is trained: d numbers for the whole model. As in PEFT no factor is zero, so the start changes the model slightly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from peftcore_lora.layers import LowRankLinear
from torch import Tensor, nn

from peftcore import plugin
from peftcore.plugin import (
    Architecture,
    Around,
    Method,
    PeftRules,
    Placement,
    StateRules,
    hookimpl,
    targets,
    validation,
)

peftcore_api = ">=3.0,<4"


@dataclass(frozen=True)
class UniLoraConfig(targets.LayersConfig):
    """Config with the field names of Hugging Face PEFT's `UniLoraConfig`; the other fields are LoRA's.

    Args:
        theta_d_length: d.
        proj_seed: seed of the columns, which NumPy draws.
        init_weights: True: theta is uniform within init_theta_d_bound of zero. False: normal.
        save_indices: save the columns and scales; otherwise loading draws them again.
    """

    r: int = 4
    proj_seed: int = 42
    theta_d_length: int = 256
    unilora_dropout: float = 0.0
    bias: Literal["none", "all", "unilora_only"] = "none"
    init_theta_d_bound: float = 0.02
    init_weights: bool = True
    save_indices: bool = False

    not_in_peft = frozenset({"exclude_modules"})

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.positive_whole(r=self.r, theta_d_length=self.theta_d_length)
        validation.probability(unilora_dropout=self.unilora_dropout)
        bound = self.init_theta_d_bound
        validation.require(bound > 0, f"init_theta_d_bound must be positive, found {bound}")


class Theta(nn.Module):
    """Vector theta, shared by all layers."""

    def __init__(self, config: UniLoraConfig) -> None:
        super().__init__()
        values, bound = torch.empty(config.theta_d_length), config.init_theta_d_bound
        values = values.uniform_(-bound, bound) if config.init_weights else values.normal_()
        self.unilora_theta_d = nn.Parameter(values)


class UniLora(LowRankLinear):
    """Indices into theta, int64, and scales of A `[r, in]` and B `[out, r]`."""

    def __init__(self, config: UniLoraConfig, theta: Theta, columns: Tensor, scales: Tensor, sizes: Any) -> None:
        super().__init__(dropout=config.unilora_dropout)
        self.theta = theta
        (width, out_width), r = sizes, config.r
        for name, values in (("indices", columns), ("scales", scales)):
            a, b = values.split([r * width, r * out_width])
            self.register_buffer(f"unilora_{name}_A", a.view(r, width).clone(), persistent=config.save_indices)
            self.register_buffer(f"unilora_{name}_B", b.view(out_width, r).clone(), persistent=config.save_indices)

    def extra_repr(self) -> str:
        return f"r={len(self.get_buffer('unilora_indices_A'))}"

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.factor("A"), self.factor("B")

    def factor(self, factor: str) -> Tensor:
        columns, scales = (self.get_buffer(f"unilora_{buffer}_{factor}") for buffer in ("indices", "scales"))
        return self.theta.unilora_theta_d.to(columns.device)[columns] * scales


def draw_columns(config: UniLoraConfig, count: int) -> Tensor:
    """Draw a column for each of `count` numbers, as in PEFT. All columns occur equally often, up to the remainder."""
    if torch.empty(0).is_meta:
        return torch.empty(count, dtype=torch.int64)
    d, generator = config.theta_d_length, np.random.default_rng(config.proj_seed)
    remainder = generator.choice(d, size=count % d, replace=False) if count % d else np.arange(0)
    columns = np.concatenate([np.repeat(np.arange(d), count // d), remainder])
    generator.shuffle(columns)
    return torch.as_tensor(columns, dtype=torch.int64, device="cpu")


def place(model: nn.Module, config: UniLoraConfig, architecture: Architecture) -> list[Placement]:
    layers = {path: targets.sizes(module) for path, module in config.selected(model, architecture).items()}
    counts = [config.r * sum(sizes) for sizes in layers.values()]
    columns, theta = draw_columns(config, sum(counts)), Theta(config)
    ones = torch.ones(len(columns), device=columns.device)
    uses = ones.new_zeros(config.theta_d_length).index_add(0, columns, ones)
    scales, placements = uses.rsqrt()[columns], []
    for path, layer_columns, layer_scales in zip(layers, columns.split(counts), scales.split(counts), strict=True):
        placements.append(Around(path, UniLora(config, theta, layer_columns, layer_scales, layers[path])))
    return [*placements, *targets.trained_biases(model, config.bias, layers)]


def tensor_name(placement: Any, name: str) -> str:
    """Name theta without a layer, since the file contains it once."""
    return f"base_model.{name.removeprefix('theta.')}" if "theta." in name else plugin.tensor_name(placement, name)


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(
        peft_type="UNILORA", tensor_name=tensor_name, peft=PeftRules(own_fields=UniLoraConfig.not_in_peft)
    )
    return [Method("unilora", UniLoraConfig, place, rules, learning_rate=5e-3)]
