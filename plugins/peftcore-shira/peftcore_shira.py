"""SHiRA (Bhardwaj et al. 2024, arXiv 2406.13175): y = (W + S) x + b, S sparse, at random positions.

    W [out, in]      . . . . .       + S      . 3 . . .       r · (in + out) of the in · out positions, as many numbers
                     . . . . .                . . . 1 .       as LoRA of rank r has; the rank of S is not bounded
                     . . . . .                2 . . . .

Trained: the numbers, zero at the start. Most weights stay unchanged, so several adapters hardly overlap.
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
        r: train r · (in + out) numbers of each layer.
        mask_type: choice of their positions: "random". Others are functions of PEFT's users; such positions are read
            from a file, and cannot be drawn.
        random_seed: seed of the positions. None: the default seed of a new generator.
        init_weights: False: the numbers are random, so the adapter changes the model from the start.
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
        count, whole = self.r * (width + out_width), width * out_width
        return (
            f"r={self.r} asks for {count} numbers of '{path}', whose weight has only {whole}" if count > whole else None
        )


class Shira(Adapter):
    """Numbers `shira_weight` `[n]`, and their rows and columns in W `[out, in]`, `shira_indices` `[2, n]`."""

    shira_indices: Tensor

    def __init__(self, places: Tensor, sizes: Sequence[int], start: bool) -> None:
        super().__init__()
        self.width, self.out_width = sizes
        self.shira_weight = nn.Parameter((torch.zeros if start else torch.randn)(places.shape[1]))
        self.register_buffer("shira_indices", places.clone())

    def forward(self, base: Base, x: Tensor) -> Tensor:
        weight, bias = base.linear_operands(x) or (None, None)
        autocast = torch.is_autocast_enabled("cpu" if x.is_meta else x.device.type)
        if isinstance(weight, Tensor) and weight.dtype == torch.float32 and not autocast:
            return F.linear(x, self.merged(weight, bias)[0], bias)
        return base(x) + F.linear(x, self.change(x.dtype))  # in 16 bits W + S would round small numbers away

    def change(self, dtype: torch.dtype) -> Tensor:
        """Return S, `[out, in]`."""
        empty = self.shira_weight.new_zeros(self.out_width, self.width, dtype=dtype)
        return empty.index_put(self.places(), self.shira_weight.to(dtype))

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight.index_put(self.places(), self.shira_weight.to(weight), accumulate=True), bias

    @override
    def neutral(self) -> dict[str, Tensor]:
        return {"shira_weight": torch.zeros_like(self.shira_weight)}

    def places(self) -> tuple[Tensor, Tensor]:
        """Return rows and columns; they are distinct, so sums do not depend on an order."""
        rows, columns = self.shira_indices.long()
        return rows, columns


def drawn(config: ShiraConfig, width: int, out_width: int) -> Tensor:
    """Return positions `[2, n]` in a weight `[out, in]`, row by row, drawn as in PEFT; equal for layers of one size."""
    count, whole = config.r * (width + out_width), width * out_width
    if torch.empty(0).is_meta:
        return torch.empty(2, count, dtype=torch.int32)
    generator = torch.Generator()
    if config.random_seed is not None:
        generator.manual_seed(config.random_seed)
    chosen = torch.randperm(whole, generator=generator, device="cpu")[:count].sort()[0]
    return torch.stack([chosen // width, chosen % width]).int()


def place(model: nn.Module, config: ShiraConfig, architecture: Architecture) -> list[Placement]:
    layers = {path: targets.sizes(layer) for path, layer in config.selected(model, architecture).items()}
    places = {sizes: drawn(config, *sizes) for sizes in set(layers.values())}
    return [Around(p, Shira(places[sizes], sizes, config.init_weights)) for p, sizes in layers.items()]


def refuse(model: nn.Module, adapters: Any, config: ShiraConfig, batches: Any) -> None:
    """Raise a PeftcoreError for a new adapter whose positions cannot be drawn here."""
    what = "is a user's function in PEFT, so its positions can only be read from files. Use mask_type='random'"
    raise PeftcoreError(f"mask_type={config.mask_type!r} {what}")


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(
        peft_type="SHIRA", peft=PeftRules(own_fields=ShiraConfig.not_in_peft, unreadable=targets.conv1d_paths)
    )
    foreign = lambda config: config.mask_type != "random"  # noqa: E731
    return [Method("shira", ShiraConfig, place, rules, refuse, initializes=foreign, learning_rate=5e-4)]
