"""SHiRA (Bhardwaj et al. 2024, arXiv 2406.13175): y = (W + S) x + b, S sparse, with its numbers at places drawn once.

    W [out, in]      . . . . .       + S      . 3 . . .       r · (in + out) of the in · out places, as many numbers
                     . . . . .                . . . 1 .       as LoRA of rank r trains; the rank of S is not bounded
                     . . . . .                2 . . . .

Trained: the numbers, zero at the start. Each weight keeps most of its own values, so several adapters hardly meet.
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
    """The fields bear the names of Hugging Face PEFT's `ShiraConfig`; those that are not here are LoRA's.

    Args:
        r: r · (in + out) numbers of a layer are trained.
        mask_type: how their places are chosen: "random". Other ones are functions of PEFT's users; their places
            are read from a file, and cannot be drawn.
        random_seed: of the places. None: PyTorch's own seed of a new generator.
        init_weights: False: the numbers are drawn, so that the adapter changes the model from the start.
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
        return f"r={self.r} asks for {count} numbers of '{path}', whose weight has {whole}" if count > whole else None


class Shira(Adapter):
    """`shira_weight` `[n]` are the numbers, `shira_indices` `[2, n]` their rows and columns in W `[out, in]`."""

    shira_indices: Tensor

    def __init__(self, places: Tensor, sizes: Sequence[int], start: bool) -> None:
        super().__init__()
        self.width, self.out_width = sizes
        self.shira_weight = nn.Parameter((torch.zeros if start else torch.randn)(places.shape[1]))
        self.register_buffer("shira_indices", places.clone())

    def forward(self, base: Base, x: Tensor) -> Tensor:
        weight, bias = base.linear_operands(x) or (None, None)
        if isinstance(weight, Tensor) and weight.dtype == torch.float32:
            return F.linear(x, self.merged(weight, bias)[0], bias)
        return base(x) + F.linear(x, self.change(x.dtype))  # in 16 bits W + S would lose small numbers

    def change(self, dtype: torch.dtype) -> Tensor:
        """S, `[out, in]`."""
        empty = self.shira_weight.new_zeros(self.out_width, self.width, dtype=dtype)
        return empty.index_put(self.places(), self.shira_weight.to(dtype))

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight.index_put(self.places(), self.shira_weight.to(weight), accumulate=True), bias

    @override
    def neutral(self) -> dict[str, Tensor]:
        return {"shira_weight": torch.zeros_like(self.shira_weight)}

    def places(self) -> tuple[Tensor, Tensor]:
        """Rows and columns; distinct, so that what is added does not depend on an order."""
        rows, columns = self.shira_indices.long()
        return rows, columns


def drawn(config: ShiraConfig, width: int, out_width: int) -> Tensor:
    """Places `[2, n]` in a weight `[out, in]`, row by row, as PEFT draws them; all layers of a size have the same."""
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
    """Of a new adapter whose places cannot be drawn here."""
    what = "is a function that PEFT's user gave: its places are read from files. Draw them: mask_type='random'"
    raise PeftcoreError(f"mask_type={config.mask_type!r} {what}")


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(
        peft_type="SHIRA", peft=PeftRules(own_fields=ShiraConfig.not_in_peft, unreadable=targets.conv1d_paths)
    )
    foreign = lambda config: config.mask_type != "random"  # noqa: E731
    return [Method("shira", ShiraConfig, place, rules, refuse, initializes=foreign, learning_rate=5e-4)]
