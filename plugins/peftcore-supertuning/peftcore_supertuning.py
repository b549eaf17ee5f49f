"""Super-tuning (arXiv 2607.09287): y = (W + S) x + b, where S is sparse and nonzero where W is largest.

    W [out, in]      1 . 9 . .       + S      . . 3 . .       the share 1 - sparsity of the entries, where |W| is
                     . . . 8 .                . . . 1 .       largest, or smallest with select_top=False
                     7 . . . .                2 . . . .

The entries of S are trained and start at zero. With r ("Supra") a LoRA is added: + lora_alpha / r · B A dropout(x).
Positions are always saved, since a W of another dtype would give others. Hugging Face PEFT's files with
save_precomputed_indices=False lack them, and they are computed from W, as in PEFT.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

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
    weight_format,
)

peftcore_api = ">=3.0,<4"


@dataclass(frozen=True)
class SupertuningConfig(targets.LayersConfig):
    """Config with the field names of Hugging Face PEFT's `SupertuningConfig`; the other fields select layers.

    Args:
        sparsity: share of a weight's entries that are not trained.
        select_top: train the largest entries; False: the smallest.
        r: rank of the additional LoRA. None: no LoRA.
        lora_alpha, lora_dropout: alpha (None: 2 r) and dropout of the LoRA.
        init_weights: False: random entries and B; the adapter then changes the model from the start.
    """

    not_in_peft: ClassVar[frozenset[str]] = frozenset(
        {"exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"}
    )
    sparsity: float = 0.99
    select_top: bool = True
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.require(0 <= self.sparsity < 1, f"sparsity must be in [0, 1), found {self.sparsity}")
        validation.probability(lora_dropout=self.lora_dropout)
        if self.r is not None:
            validation.positive_whole(r=self.r)
        lacks_rank = self.lora_alpha is not None and self.r is None
        validation.require(not lacks_rank, "lora_alpha needs a LoRA. Set its rank r as well")

    def resolved(self, model: nn.Module, architecture: Architecture) -> Any:
        """Return the config with lora_alpha filled in."""
        config = super().resolved(model, architecture)
        return replace(config, lora_alpha=2.0 * self.r) if self.r and self.lora_alpha is None else config


class Supertuning(Adapter):
    """Entries `supertuning_values` `[n]`, their positions in the flat W `[out · in]`, and A, B of the LoRA."""

    supertuning_indices: Tensor

    def __init__(self, config: SupertuningConfig, indices: Tensor, width: int, out_width: int) -> None:
        super().__init__()
        self.sizes, self.scale = (out_width, width), (config.lora_alpha or 0.0) / (config.r or 1)
        self.supertuning_values = nn.Parameter((torch.zeros if config.init_weights else torch.randn)(len(indices)))
        self.register_buffer("supertuning_indices", indices)
        self.dropout = nn.Dropout(config.lora_dropout)
        if config.r is not None:
            self.supertuning_lora_A = nn.Linear(width, config.r, bias=False)
            self.supertuning_lora_B = nn.Linear(config.r, out_width, bias=False)
            nn.init.kaiming_uniform_(self.supertuning_lora_A.weight, a=math.sqrt(5))
            if config.init_weights:
                nn.init.zeros_(self.supertuning_lora_B.weight)

    def with_sparse(self, weight: Tensor) -> Tensor:
        """Return weight `[out, in]` + S."""
        values = self.supertuning_values.to(weight.dtype)
        return weight.reshape(-1).index_add(0, self.supertuning_indices.long(), values).view(self.sizes)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        weight, bias = base.linear_operands(x) or (None, None)
        autocast = torch.is_autocast_enabled("cpu" if x.is_meta else x.device.type)
        if isinstance(weight, Tensor) and weight.dtype == torch.float32 and not autocast:
            y = F.linear(x, self.with_sparse(weight), bias)
        else:
            # In 16 bits W + S would round small entries away.
            y = base(x) + F.linear(x, self.with_sparse(x.new_zeros(self.sizes)))
        if self.scale:
            low = self.supertuning_lora_A(self.dropout(x).to(self.supertuning_values.dtype))
            y = y + (self.scale * self.supertuning_lora_B(low)).to(y.dtype)
        return y

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        adapted_weight = self.with_sparse(weight)
        if self.scale:
            product = self.supertuning_lora_B.weight.float() @ self.supertuning_lora_A.weight.float()
            adapted_weight = adapted_weight + self.scale * product
        return adapted_weight, bias


def layer_positions(module: nn.Module, config: SupertuningConfig, path: str) -> Tensor:
    """Return the positions to train in a layer's weight, int32 `[n]`."""
    width, out_width = targets.sizes(module)
    count = int(width * out_width * (1 - config.sparsity))
    message = f"sparsity={config.sparsity} leaves none of the {width * out_width} numbers of '{path}' to train"
    validation.require(count > 0, f"{message}. Lower it, or leave the layer out: exclude_modules=['{path}']")
    layer: Any = getattr(module, "base_layer", module)
    if layer.weight.is_meta or torch.empty(0).is_meta:
        return torch.empty(count, dtype=torch.int32)
    return extreme_positions(weight_format(module).read(module), count, config.select_top)


def extreme_positions(weight: Tensor, count: int, largest: bool) -> Tensor:
    """Return the positions, int32 `[count]`, of a weight's largest or smallest magnitudes."""
    return weight.detach().abs().flatten().topk(count, largest=largest)[1].int()


def place(model: nn.Module, config: SupertuningConfig, architecture: Architecture) -> list[Placement]:
    layers = config.selected(model, architecture)
    return [
        Around(path, Supertuning(config, layer_positions(module, config, path), *targets.sizes(module)))
        for path, module in layers.items()
    ]


def read(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    """Compute the positions from the model's weights if a file of PEFT lacks them."""
    fields = {name: value for name, value in fields.items() if name != "save_precomputed_indices"}
    if model is None:
        return tensors, fields
    completed = dict(tensors)
    for name in tensors:
        prefix, _, parameter = name.rpartition(".")
        if parameter == "supertuning_values" and f"{prefix}.supertuning_indices" not in tensors:
            weight = targets.dense_weight(model, prefix.removeprefix("base_model.model."))
            indices = extreme_positions(weight, len(tensors[name]), fields.get("select_top", True))
            completed[f"{prefix}.supertuning_indices"] = indices
    return completed, fields


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(
        peft_type="SUPERTUNING",
        read=read,
        peft=PeftRules(own_fields=SupertuningConfig.not_in_peft, unreadable=targets.conv1d_paths),
    )
    return [Method("supertuning", SupertuningConfig, place, rules, learning_rate=5e-4)]
