"""DeLoRA (Bini et al. 2025, arXiv 2503.18225, eq. 6): separate the direction and the strength of a low-rank update.

    W + λ / r · Σᵢ bᵢ aᵢᵀ / (‖bᵢ‖ ‖aᵢ‖) · diag(n)          n [in]: norms of W's columns at the start

Each of the r products has norm 1, so λ bounds the change of the weight, whatever the learning rate. A [r, in],
B [out, r], zero at the start, and λ are trained; n is saved with them. The forward pass is that of LoRA, with scaled A.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peftcore_lora.layers import LowRankLinear
from torch import Tensor, nn

from peftcore.plugin import (
    Architecture,
    Around,
    Method,
    PeftRules,
    Placement,
    StateRules,
    hookimpl,
    inside_at,
    targets,
    validation,
)

peftcore_api = ">=3.0,<4"


@dataclass(frozen=True)
class DeloraConfig(targets.LayersConfig):
    """Config with the field names of Hugging Face PEFT's `DeloraConfig`; the other fields select layers.

    Args:
        r: rank.
        delora_lambda: λ at the start.
        rank_pattern, lambda_pattern: values for single layers, by name.
        module_dropout: dropout probability of the inputs of A.
        bias: biases to train as well: "none", "all", or "delora_only" (of adapted modules).
        init_weights: False: B is random too; the adapter then changes the model from the start.
    """

    not_in_peft = frozenset({"fan_in_fan_out"})
    r: int = 8
    delora_lambda: float = 15
    module_dropout: float = 0.0
    bias: Literal["none", "all", "delora_only"] = "none"
    init_weights: bool = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    lambda_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.positive_whole(r=self.r, **self.rank_pattern)
        validation.probability(module_dropout=self.module_dropout)


class Delora(LowRankLinear):
    """`delora_A` `[r, in]`, `delora_B` `[out, r]`, `delora_lambda` `[1]`, and n, `delora_w_norm` `[in]`."""

    def __init__(self, config: DeloraConfig, path: str, width: int, out_width: int) -> None:
        super().__init__(dropout=config.module_dropout)
        r = targets.pattern_value(config.rank_pattern, path, config.r)
        strength = float(targets.pattern_value(config.lambda_pattern, path, config.delora_lambda))
        self.delora_A = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(r, width), a=math.sqrt(5)))
        self.delora_B = nn.Parameter(torch.zeros(out_width, r))
        self.delora_lambda = nn.Parameter(torch.full((1,), strength))
        self.register_buffer("delora_w_norm", torch.ones(width))
        if not config.init_weights:
            nn.init.kaiming_uniform_(self.delora_B, a=math.sqrt(5))

    def pair(self) -> tuple[Tensor, Tensor]:
        a, b = self.delora_A.float(), self.delora_B.float()
        lengths = a.norm(dim=1).clamp(min=1e-4) * b.norm(dim=0).clamp(min=1e-4)
        factor = self.delora_lambda.float() / len(a) / lengths
        return a * factor[:, None] * self.get_buffer("delora_w_norm").float(), b


def place(model: nn.Module, config: DeloraConfig, architecture: Architecture) -> list[Placement]:
    layers = {path: targets.sizes(module) for path, module in config.selected(model, architecture).items()}
    placements: list[Placement] = [Around(path, Delora(config, path, *sizes)) for path, sizes in layers.items()]
    return placements + targets.trained_biases(model, config.bias, layers)


def initialize(model: nn.Module, adapters: Any, config: DeloraConfig, batches: Any) -> None:
    """Set n to the column norms of the weight that the adapter wraps; the training batches are not used."""
    for path, delora in adapters.items():
        delora.delora_w_norm.copy_(inside_at(model, path).weight().float().norm(dim=0))


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(
        peft_type="DELORA", peft=PeftRules(own_fields=DeloraConfig.not_in_peft, unreadable=targets.conv1d_paths)
    )
    return [Method("delora", DeloraConfig, place, rules, initialize, learning_rate=1e-2)]
