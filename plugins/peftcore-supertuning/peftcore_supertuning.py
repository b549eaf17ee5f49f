"""Super-tuning (arXiv 2607.09287): y = (W + S) x + b, S sparse, non-zero where W is largest.

    W [out, in]      1 . 9 . .       + S      . . 3 . .       the share 1 - sparsity of positions with the largest |W|,
                     . . . 8 .                . . . 1 .       or the smallest (select_top=False)
                     7 . . . .                2 . . . .

Trained: the numbers, zero at the start. With r ("Supra") a LoRA is added: + lora_alpha / r · B A dropout(x). The
positions are always saved, since they differ in a W of another dtype. Files that Hugging Face PEFT wrote with
save_precomputed_indices=False lack them; they are then computed from W, as in PEFT.
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
        sparsity: share of a weight's numbers that are not trained.
        select_top: train the largest numbers; False: the smallest.
        r: rank of the additional LoRA. None: no LoRA.
        lora_alpha, lora_dropout: alpha (None: 2 r) and dropout of the LoRA.
        init_weights: False: numbers and B are random, so the adapter changes the model from the start.
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
        alone = self.lora_alpha is not None and self.r is None
        validation.require(not alone, "lora_alpha needs a LoRA. Give its rank r, too")

    def resolved(self, model: nn.Module, architecture: Architecture) -> Any:
        """Return the config with the LoRA's scale made explicit."""
        found = super().resolved(model, architecture)
        return replace(found, lora_alpha=2.0 * self.r) if self.r and self.lora_alpha is None else found


class Supertuning(Adapter):
    """Numbers `supertuning_values` `[n]`, their positions in the flat W `[out · in]`, and A, B of the LoRA."""

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
        else:  # in 16 bits W + S would round small numbers away
            y = base(x) + F.linear(x, self.with_sparse(x.new_zeros(self.sizes)))
        if self.scale:
            low = self.supertuning_lora_A(self.dropout(x).to(self.supertuning_values.dtype))
            y = y + (self.scale * self.supertuning_lora_B(low)).to(y.dtype)
        return y

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        changed = self.with_sparse(weight)
        if self.scale:
            product = self.supertuning_lora_B.weight.float() @ self.supertuning_lora_A.weight.float()
            changed = changed + self.scale * product
        return changed, bias


def places_of(module: nn.Module, config: SupertuningConfig, path: str) -> Tensor:
    """Return positions, int32 `[n]`, where the layer's weight `[out, in]` is largest, or smallest."""
    width, out_width = targets.sizes(module)
    count = int(width * out_width * (1 - config.sparsity))
    whole = f"sparsity={config.sparsity} leaves none of the {width * out_width} numbers of '{path}' to train"
    validation.require(count > 0, f"{whole}. Lower it, or exclude the layer")
    stored: Any = getattr(module, "base_layer", module)
    if stored.weight.is_meta or torch.empty(0).is_meta:
        return torch.empty(count, dtype=torch.int32)
    return chosen(weight_format(module).read(module), count, config.select_top)


def chosen(weight: Tensor, count: int, largest: bool) -> Tensor:
    """Return the positions, int32 `[count]`, of the largest or smallest numbers of a weight."""
    return weight.detach().abs().flatten().topk(count, largest=largest)[1].int()


def place(model: nn.Module, config: SupertuningConfig, architecture: Architecture) -> list[Placement]:
    layers = config.selected(model, architecture)
    return [
        Around(path, Supertuning(config, places_of(module, config, path), *targets.sizes(module)))
        for path, module in layers.items()
    ]


def read(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    """Add indices that a file of PEFT lacks, from the model's weights."""
    fields = {name: value for name, value in fields.items() if name != "save_precomputed_indices"}
    if model is None:
        return tensors, fields
    found = dict(tensors)
    for name in tensors:
        prefix, _, last = name.rpartition(".")
        if last == "supertuning_values" and f"{prefix}.supertuning_indices" not in tensors:
            weight = targets.dense_weight(model, prefix.removeprefix("base_model.model."))
            indices = chosen(weight, len(tensors[name]), fields.get("select_top", True))
            found[f"{prefix}.supertuning_indices"] = indices
    return found, fields


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(
        peft_type="SUPERTUNING",
        read=read,
        peft=PeftRules(own_fields=SupertuningConfig.not_in_peft, unreadable=targets.conv1d_paths),
    )
    return [Method("supertuning", SupertuningConfig, place, rules, learning_rate=5e-4)]
