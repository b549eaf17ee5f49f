"""RoAd (Liao and Monz 2024, arXiv 2409.00119, eq. 4): rotate and scale pairs of a layer's outputs.

    y = W x + bias        z₀ = g cos t · y₀ - g sin t · y₁         in a group of n outputs, y₀ is in the first half
    (y₀, y₁): a pair      z₁ = g sin t · y₀ + g cos t · y₁         and y₁ is n / 2 positions after it

    road_1   one t and g per pair               road_4   one t and g for each of the four factors of a pair
    road_2   one t and g per z

t, initially zero, and g, initially one, are trained. (R - 1) y is added to y, so that small rotations are not rounded
away in 16 bits. Merging rotates the rows of W and the bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
    validation,
)

peftcore_api = ">=3.0,<4"


@dataclass(frozen=True)
class RoadConfig(targets.LayersConfig):
    """Config with the field names of Hugging Face PEFT's `RoadConfig`; the other fields select layers.

    Args:
        variant: "road_1", "road_2" or "road_4".
        group_size: outputs per group; even, and it must divide each layer's outputs.
        init_weights: False: random rotations; the adapter then changes the model from the start.
    """

    not_in_peft = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"})
    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: int = 64
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.positive_whole(group_size=self.group_size)
        validation.require(self.group_size % 2 == 0, f"group_size must be even, found {self.group_size}")

    def misfit(self, path: str, module: nn.Module) -> str | None:
        width = targets.sizes(module)[1]
        if width % self.group_size == 0:
            return None
        return f"group_size={self.group_size} does not divide the {width} outputs of '{path}'. Choose a divisor"


class Road(Adapter):
    """`road_theta` and `road_alpha` of a linear layer, `[out / 2]`, `[out]` or `[2 · out]` by variant."""

    def __init__(self, config: RoadConfig, out_width: int) -> None:
        super().__init__()
        self.span, self.sets = config.group_size // 2, {"road_1": 1, "road_2": 2, "road_4": 4}[config.variant]
        self.road_theta = nn.Parameter(torch.zeros(out_width // 2 * self.sets))
        self.road_alpha = nn.Parameter(torch.ones(out_width // 2 * self.sets))
        if not config.init_weights:
            nn.init.normal_(self.road_theta, std=0.5)
            nn.init.normal_(self.road_alpha, mean=1.0, std=0.5)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return for each output its own factor minus 1 and the factor of its partner, fp32 `[out]`."""
        theta, alpha = (p.float().view(-1, self.sets, self.span) for p in (self.road_theta, self.road_alpha))
        sine_sets = slice(2, None) if self.sets == 4 else slice(None)
        diagonal, off_diagonal = (alpha * theta.cos())[:, : min(self.sets, 2)], (alpha * theta.sin())[:, sine_sets]
        signs = torch.tensor([[-1.0], [1.0]], device=off_diagonal.device)
        return (diagonal - 1).expand(-1, 2, -1).flatten(), (off_diagonal * signs).flatten()

    def rotated(self, y: Tensor) -> Tensor:
        """Return y `[..., out]` with its pairs rotated."""
        diagonal, off_diagonal = (factor.to(y.dtype) for factor in self.factors())
        partners = y.unflatten(-1, (-1, 2, self.span)).flip(-2).flatten(-3)
        return torch.addcmul(torch.addcmul(y, y, diagonal), partners, off_diagonal)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        return self.rotated(base(x))

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.rotated(weight.T).T, None if bias is None else self.rotated(bias)


def place(model: nn.Module, config: RoadConfig, architecture: Architecture) -> list[Placement]:
    widths = {path: targets.sizes(module)[1] for path, module in config.selected(model, architecture).items()}
    return [Around(path, Road(config, width)) for path, width in widths.items()]


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(
        peft_type="ROAD", peft=PeftRules(own_fields=RoadConfig.not_in_peft, unreadable=targets.conv1d_paths)
    )
    return [Method("road", RoadConfig, place, rules, learning_rate=5e-3)]
