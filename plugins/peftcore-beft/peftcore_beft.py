"""BEFT, bias-efficient fine-tuning (Huang et al. 2025, arXiv 2509.15974): y = W x + b + d, d zero at the start.

Unlike BitFit it adapts selected layers, also those without a bias. The paper found that the value projections matter
most: `target_modules=["v_proj"]`. d merges into b, so only layers with a bias can be merged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

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
    override,
    targets,
)

peftcore_api = ">=3.0,<4"


@dataclass(frozen=True)
class BeftConfig(targets.LayersConfig):
    """Config with the field names of Hugging Face PEFT's `BeftConfig`; the other fields are LoRA's.

    Args:
        init_weights: False: random d; the adapter then changes the model from the start.
    """

    init_weights: bool = True

    not_in_peft = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"})


class Beft(Adapter):
    """Trained bias d `[1, out]` of a linear layer."""

    def __init__(self, out_width: int, zero_init: bool) -> None:
        super().__init__()
        self.beft_bias = nn.Parameter((torch.zeros if zero_init else torch.randn)(1, out_width))

    def forward(self, base: Base, x: Tensor) -> Tensor:
        return base(x) + self.beft_bias[0].to(x.dtype)

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        d = self.beft_bias[0].float()
        return weight, d if bias is None else bias + d

    @override
    def neutral(self) -> dict[str, Tensor]:
        return {"beft_bias": torch.zeros_like(self.beft_bias)}


def place(model: nn.Module, config: BeftConfig, architecture: Architecture) -> list[Placement]:
    layers = config.selected(model, architecture).items()
    return [Around(path, Beft(targets.sizes(layer)[1], config.init_weights)) for path, layer in layers]


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(
        peft_type="BEFT", peft=PeftRules(own_fields=BeftConfig.not_in_peft, unreadable=targets.conv1d_paths)
    )
    return [Method("beft", BeftConfig, place, rules, learning_rate=3e-3)]
