"""HiRA (Huang et al. 2025, ICLR, "Hadamard high-rank adaptation"): y = (W + W ⊙ B A) x + b, ⊙ number by number.

x ---+--- W ----------(+)--- + b --- y        A [r, in], B [out, r]: thin, and trained; B zero at the start
     '--- W ⊙ B A ---- '                      the change's rank goes up to r · rank(W)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftcore
from peftcore import targets, validation

peftcore_api = 2


@dataclass(frozen=True)
class HiraConfig(targets.LayersConfig):
    """The fields bear the names of Hugging Face PEFT's `HiraConfig`; those that are not here are LoRA's.

    Args:
        hira_dropout: probability with which an input of W ⊙ B A is dropped in training.
        init_weights: True: A is drawn as LoRA's; "gaussian": with standard deviation 1 / r. Not True: B is drawn, too.
        rank_pattern: ranks of layers, by the ends of their paths or regular expressions.
    """

    r: int = 32
    hira_dropout: float = 0.0
    init_weights: bool | Literal["gaussian"] | None = True
    rank_pattern: dict[str, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.positive_whole(r=self.r, **(self.rank_pattern or {}))
        validation.probability(hira_dropout=self.hira_dropout)


class Hira(nn.Module):
    """A and B of a linear layer; x `[..., in]` -> y `[..., out]`."""

    def __init__(self, config: HiraConfig, r: int, width: int, out_width: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.hira_dropout)
        self.hira_A = nn.Parameter(torch.randn(r, width))
        self.hira_B = nn.Parameter(torch.zeros(out_width, r) if config.init_weights else torch.randn(out_width, r))
        if config.init_weights is True:
            nn.init.kaiming_uniform_(self.hira_A, a=math.sqrt(5))
        elif config.init_weights:
            nn.init.normal_(self.hira_A, std=1 / r)

    def forward(self, base: Any, x: Tensor) -> Tensor:
        weight, bias = base.linear_operands(x) or (None, None)
        drops = self.training and self.dropout.p > 0
        if isinstance(weight, Tensor) and weight.dtype == torch.float32 and not drops:
            return F.linear(x, self.merged(weight, bias)[0], bias)
        change = base.weight() * (self.hira_B @ self.hira_A)
        return base(x) + F.linear(self.dropout(x), change.to(x.dtype))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + weight * (self.hira_B.float() @ self.hira_A.float()), bias

    def neutral(self) -> dict[str, Tensor]:
        return {"hira_B": torch.zeros_like(self.hira_B)}


def place(model: nn.Module, config: HiraConfig, architecture: peftcore.Architecture) -> list[Any]:
    layers = {path: targets.sizes(module) for path, module in config.selected(model, architecture).items()}
    ranks = {path: targets.pattern_value(config.rank_pattern, path, config.r) for path in layers}
    return [peftcore.Around(path, Hira(config, ranks[path], *sizes)) for path, sizes in layers.items()]


def refused(model: nn.Module, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> str | None:
    """PEFT 0.21 writes rank_pattern into the config and gives each layer the rank r."""
    r, found = fields.get("r", 32), {len(tensor) for name, tensor in tensors.items() if name.endswith(".hira_A")}
    if found != {r} or set((fields.get("rank_pattern") or {}).values()) <= {r}:
        return None
    return f"its rank_pattern is not that of its tensors, whose ranks are {r}. Take it out of adapter_config.json"


@peftcore.hookimpl
def peftcore_methods() -> list[peftcore.Method]:
    filled = lambda fields: {**fields, "rank_pattern": fields["rank_pattern"] or {}}  # noqa: E731
    rules = peftcore.StateRules(peft_type="HIRA", write_config=filled, refused=refused)
    return [peftcore.Method("hira", HiraConfig, place, rules, learning_rate=1e-2)]
