"""MiSS (Kang and Yin 2024, arXiv 2409.15371; formerly Bone): all shards of a weight share one matrix D [r, out].

    x [in] in shards of r, the last zero-padded:  s = x[0:r] + x[r:2r] + ...      y = W x + bias + Dᵀ s

The change of W is Dᵀ, repeated along the inputs. D is trained and starts at zero. `init_weights` selects two variants:

    "mini"   D [r, mini_r] is repeated along the outputs as well
    "bat"    D [out / r, r, r]: W' = W + W[o, i] D[o] + D[o] for each block [r, r]; each call computes W'

Bone's files (PEFT before 0.18) only differ in their names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
)

peftcore_api = ">=3.0,<4"


@dataclass(frozen=True)
class MissConfig(targets.LayersConfig):
    """Config with the field names of Hugging Face PEFT's `MissConfig`; the other fields select layers.

    Args:
        r: size of a shard and rank of the update; at most the number of a layer's inputs.
        miss_dropout: dropout probability of the inputs; not with "bat".
        mini_r: for "mini", the number of outputs after which D repeats; it must divide a layer's outputs.
        bias: biases to train as well: "none", "all", or "MiSS_only" (of adapted modules; "bone_only" in Bone).
        init_weights: True, or the variant "mini" or "bat". False: D is random.
    """

    not_in_peft = frozenset({"fan_in_fan_out"})
    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    bias: Literal["none", "all", "MiSS_only", "miss_only", "bone_only", "Bone_only"] = "none"
    init_weights: bool | Literal["bat", "mini"] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.positive_whole(r=self.r, mini_r=self.mini_r)
        validation.probability(miss_dropout=self.miss_dropout)
        dropout_fits = not self.miss_dropout or self.init_weights != "bat"
        validation.require(
            dropout_fits,
            "miss_dropout has no effect with init_weights='bat', which changes the weight itself. Leave it out",
        )


class Miss(Adapter):
    """D of a linear layer, `miss_block`: `[r, out]`; for "mini" `[r, mini_r]`, for "bat" `[out / r, r, r]`."""

    def __init__(self, config: MissConfig, out_width: int) -> None:
        super().__init__()
        self.variant, self.r, self.dropout = config.init_weights, config.r, nn.Dropout(config.miss_dropout)
        shapes = {"bat": (out_width // self.r, self.r, self.r), "mini": (self.r, config.mini_r)}
        self.miss_block = nn.Parameter(torch.zeros(shapes.get(str(self.variant), (self.r, out_width))))
        if not self.variant:
            nn.init.kaiming_uniform_(self.miss_block, a=math.sqrt(5))

    def forward(self, base: Base, x: Tensor) -> Tensor:
        if self.variant == "bat":
            weight, bias = base.weight_and_bias()
            weight, bias = self.merged(weight.float(), bias)
            return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        y, x, padding = base(x), self.dropout(x), -x.shape[-1] % self.r
        shards = (F.pad(x, (0, padding)) if padding else x).unflatten(-1, (-1, self.r))
        update = shards.sum(-2) @ self.miss_block.to(x.dtype)
        repeats = y.shape[-1] // update.shape[-1]
        return y + (update if repeats == 1 else update.repeat(*(1 for _ in y.shape[1:]), repeats))

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        block, (out, width) = self.miss_block.float(), weight.shape
        if self.variant == "bat":
            blocks = weight.view(out // self.r, self.r, width // self.r, self.r).transpose(1, 2)  # [o, i, r, r]
            change = (blocks @ block[:, None] + block[:, None]).transpose(1, 2).reshape(out, width)
        else:
            change = block.T.repeat(out // block.shape[1], -(-width // self.r))[:, :width]
        return weight + change, bias


def place(model: nn.Module, config: MissConfig, architecture: Architecture) -> list[Placement]:
    layers = {path: targets.sizes(module) for path, module in config.selected(model, architecture).items()}
    for path, (width, out_width) in layers.items():
        sizes, r = f"'{path}' has {width} inputs and {out_width} outputs", config.r
        validation.require(r <= width, f"r={r} is above the inputs: {sizes}. Choose a smaller r")
        divides = config.init_weights != "bat" or width % r == out_width % r == 0
        validation.require(divides, f"init_weights='bat' needs sizes that r={r} divides: {sizes}. Choose another r")
        mini_fits = config.init_weights != "mini" or out_width % config.mini_r == 0
        validation.require(mini_fits, f"mini_r={config.mini_r} does not divide the outputs: {sizes}. Choose a divisor")
    placements: list[Placement] = [Around(path, Miss(config, out_width)) for path, (_, out_width) in layers.items()]
    return placements + targets.trained_biases(model, config.bias, layers)


def read(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    """Rename Bone's tensors to the current names."""
    return {name.replace(".bone_block", ".miss_block"): tensor for name, tensor in tensors.items()}, fields


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(
        peft_type="MISS",
        read=read,
        peft=PeftRules(
            older_types=frozenset({"BONE"}), own_fields=MissConfig.not_in_peft, unreadable=targets.conv1d_paths
        ),
    )
    return [Method("miss", MissConfig, place, rules, learning_rate=2e-4)]
