"""SHiRA (Bhardwaj et al. 2024, arXiv 2406.13175): y = (W + S) x + b, where S is sparse with random positions.

    W [out, in]      . . . . .       + S      . 3 . . .       r · (in + out) of the in · out entries, as many as LoRA of
                     . . . . .                . . . 1 .       rank r has parameters; the rank of S is not bounded
                     . . . . .                2 . . . .

The entries of S are trained and start at zero. Most weights stay unchanged, so several adapters hardly overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.plugin import (
    Adapter,
    Architecture,
    Around,
    Base,
    Method,
    PeftcoreError,
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
class ShiraConfig(targets.LayersConfig):
    """Config with the field names of Hugging Face PEFT's `ShiraConfig`; the other fields are LoRA's.

    Args:
        r: train r · (in + out) entries of each layer.
        mask_type: how to choose their positions: "random". In PEFT a mask can also be a user's function, whose
            positions can be loaded from a file, but not drawn here.
        random_seed: seed of the positions. None: the default seed of a new generator.
        init_weights: False: random entries; the adapter then changes the model from the start.
    """

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    init_weights: bool = True

    not_in_peft = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.positive_whole(r=self.r)

    def misfit(self, path: str, module: nn.Module) -> str | None:
        width, out_width = targets.sizes(module)
        count, size = self.r * (width + out_width), width * out_width
        if count <= size:
            return None
        return f"r={self.r} needs {count} entries of '{path}', whose weight has only {size}. Choose a smaller r"


class Shira(Adapter):
    """Entries `shira_weight` `[n]`, and their rows and columns in W `[out, in]`, `shira_indices` `[2, n]`."""

    shira_indices: Tensor

    def __init__(self, positions: Tensor, sizes: Sequence[int], zero_init: bool) -> None:
        super().__init__()
        self.width, self.out_width = sizes
        self.shira_weight = nn.Parameter((torch.zeros if zero_init else torch.randn)(positions.shape[1]))
        self.register_buffer("shira_indices", positions.clone())

    def forward(self, base: Base, x: Tensor) -> Tensor:
        weight, bias = base.linear_operands(x) or (None, None)
        autocast = torch.is_autocast_enabled("cpu" if x.is_meta else x.device.type)
        if isinstance(weight, Tensor) and weight.dtype == torch.float32 and not autocast:
            return F.linear(x, self.merged(weight, bias)[0], bias)
        # In 16 bits W + S would round small entries away.
        return base(x) + F.linear(x, self.change(x.dtype))

    def change(self, dtype: torch.dtype) -> Tensor:
        """Return S, `[out, in]`."""
        empty = self.shira_weight.new_zeros(self.out_width, self.width, dtype=dtype)
        return empty.index_put(self.positions(), self.shira_weight.to(dtype))

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight.index_put(self.positions(), self.shira_weight.to(weight), accumulate=True), bias

    @override
    def neutral(self) -> dict[str, Tensor]:
        return {"shira_weight": torch.zeros_like(self.shira_weight)}

    def positions(self) -> tuple[Tensor, Tensor]:
        """Return rows and columns. No position occurs twice, so accumulating is deterministic."""
        rows, columns = self.shira_indices.long()
        return rows, columns


def draw_positions(config: ShiraConfig, width: int, out_width: int) -> Tensor:
    """Draw positions `[2, n]` in a weight `[out, in]`, sorted, as PEFT does; layers of the same size get equal ones."""
    count, size = config.r * (width + out_width), width * out_width
    if torch.empty(0).is_meta:
        return torch.empty(2, count, dtype=torch.int32)
    generator = torch.Generator()
    if config.random_seed is not None:
        generator.manual_seed(config.random_seed)
    indices = torch.randperm(size, generator=generator, device="cpu")[:count].sort()[0]
    return torch.stack([indices // width, indices % width]).int()


def place(model: nn.Module, config: ShiraConfig, architecture: Architecture) -> list[Placement]:
    layers = {path: targets.sizes(layer) for path, layer in config.selected(model, architecture).items()}
    positions = {sizes: draw_positions(config, *sizes) for sizes in set(layers.values())}
    return [Around(p, Shira(positions[sizes], sizes, config.init_weights)) for p, sizes in layers.items()]


def refuse(model: nn.Module, adapters: Any, config: ShiraConfig, batches: Any) -> None:
    """Raise a PeftcoreError for a new adapter whose positions only PEFT can draw."""
    reason = "is a user's function in PEFT, so its positions can only be loaded from files. Use mask_type='random'"
    raise PeftcoreError(f"mask_type={config.mask_type!r} {reason}")


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(
        peft_type="SHIRA", peft=PeftRules(own_fields=ShiraConfig.not_in_peft, unreadable=targets.conv1d_paths)
    )
    is_foreign = lambda config: config.mask_type != "random"  # noqa: E731
    return [Method("shira", ShiraConfig, place, rules, refuse, initializes=is_foreign, learning_rate=5e-4)]
