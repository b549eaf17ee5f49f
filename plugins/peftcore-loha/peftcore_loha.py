"""LoHa (Hyeon-Woo et al. 2021, FedPara, arXiv 2108.06098, prop. 1): W + scale · (B1 A1) ⊙ (B2 A2), scale = alpha / r.

    B1 [out, r]  A1 [r, in]      the elementwise product of two low-rank matrices, whose rank is r² at most: it is
    B2 [out, r]  A2 [r, in]      B A with B [out, r²], of products of columns, and A [r², in], of products of rows

So it is computed, as LoRA is, where r² is thin, and else by the matrix itself. Trained: all four; A2 is zero at the
start. Fields and files are PEFT's, which has them from LyCORIS.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from peftcore_lora.layers import ThinLinear
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore import Architecture, Around, Method, StateRules, hookimpl, targets, validation

peftcore_api = 2


@dataclass(frozen=True)
class LoHaConfig(targets.LayersConfig):
    """The fields bear the names of Hugging Face PEFT's `LoHaConfig`; those that are not here choose layers.

    Args:
        r, alpha: rank of each product; the scale is alpha / r. rank_pattern, alpha_pattern: others by name of a layer.
        rank_dropout: probability with which, in training, an output of the update is dropped.
        module_dropout: probability with which, in training, a layer's update is dropped as a whole.
        use_effective_conv2d: of convolutions alone, which are not known here: of linear layers it changes nothing.
        init_weights: False: A2 is random as the others are.
    """

    not_in_peft = frozenset({"fan_in_fan_out"})
    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.positive_whole(r=self.r, **self.rank_pattern)
        validation.probability(rank_dropout=self.rank_dropout, module_dropout=self.module_dropout)


class LoHa(ThinLinear):
    """`hada_w1_a` `[out, r]`, `hada_w1_b` `[r, in]` and the second pair, of a linear layer."""

    per_sample = None  # type: ignore[assignment]  # what is dropped is dropped of a whole call

    def __init__(self, config: LoHaConfig, path: str, width: int, out_width: int) -> None:
        r = targets.pattern_value(config.rank_pattern, path, config.r)
        super().__init__(targets.pattern_value(config.alpha_pattern, path, config.alpha) / r)
        self.drops, self.is_thin = (
            (config.rank_dropout, config.module_dropout),
            r * r * (width + out_width) < width * out_width,
        )
        self.hada_w1_a, self.hada_w1_b = uniform(out_width, r), uniform(r, width)
        self.hada_w2_a, self.hada_w2_b = uniform(out_width, r), uniform(r, width)
        if config.init_weights:
            nn.init.zeros_(self.hada_w2_b)

    def pair(self) -> tuple[Tensor, Tensor]:
        a = self.hada_w1_b[:, None] * self.hada_w2_b[None]
        b = self.hada_w1_a[:, :, None] * self.hada_w2_a[:, None]
        return a.flatten(0, 1), b.flatten(1)

    def delta(self) -> Tensor:
        first, second = self.hada_w1_a.float() @ self.hada_w1_b.float(), self.hada_w2_a.float() @ self.hada_w2_b.float()
        return self.scale * first * second

    def forward(self, base: Any, x: Tensor) -> Tensor:
        if self.is_thin and not (self.training and any(self.drops)):
            return super().forward(base, x)
        update = F.linear(x, self.delta().to(x.dtype))
        return base(x) + (kept(update, *self.drops) if self.training else update)


def uniform(*shape: int) -> nn.Parameter:
    """As PEFT fills factors: `kaiming_uniform_` with a = √5."""
    return nn.Parameter(nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5)))


def kept(update: Tensor, rank_dropout: float, module_dropout: float, rescaled: bool = True) -> Tensor:
    """What is left of an update `[..., out]` in training: some outputs, which make up for the others, or nothing."""
    if rank_dropout:
        mask = (torch.rand(update.shape[-1], device=update.device) > rank_dropout).to(update.dtype)
        update = update * (mask / mask.mean().clamp(min=1 / len(mask)) if rescaled else mask)
    return update * (torch.rand((), device=update.device) > module_dropout) if module_dropout else update


def place(model: nn.Module, config: LoHaConfig, architecture: Architecture) -> list[Any]:
    sizes = {path: targets.sizes(module) for path, module in config.selected(model, architecture).items()}
    return [Around(path, LoHa(config, path, *sizes[path])) for path in sizes]


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(peft_type="LOHA", own_fields=LoHaConfig.not_in_peft, unreadable=targets.conv1d_paths)
    return [Method("loha", LoHaConfig, place, rules, learning_rate=1e-2)]
