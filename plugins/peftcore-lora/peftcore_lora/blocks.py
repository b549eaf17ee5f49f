"""BD-LoRA (Wang et al. 2025, arXiv 2510.23346): A or B is block-diagonal, for tensor parallelism.

Each rank then computes its blocks alone, without communication for the LoRA:

    A = diag(A1 ... An)   Ai [r / n, in / n], for layers that are sharded by rows (o_proj, down_proj)
    B = diag(B1 ... Bn)   Bi [out / n, r / n], for layers that are sharded by columns (q_proj, up_proj)

Parameters and files store the blocks concatenated by rows: `lora_A` `[r, in / n]`, `lora_B` `[out, r / n]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftcore.plugin import targets, validation
from peftcore_lora.config import LoraConfig, nested_config
from peftcore_lora.layers import LoraLinear


@dataclass(frozen=True)
class BlockDiagonal:
    """Config with the fields of Hugging Face PEFT's `BdLoraConfig`."""

    target_modules_bd_a: Sequence[str] | None = None
    target_modules_bd_b: Sequence[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        validation.check_types(self)
        validation.positive_whole(nblocks=self.nblocks)

    def factor(self, path: str) -> Literal["A", "B"] | None:
        """Return which factor of the layer at `path` is block-diagonal, or None if neither is.

        Raises:
            PeftcoreError: both lists match the layer or, with `match_strict`, neither does.
        """
        in_a = any(name in path for name in self.target_modules_bd_a or ())
        in_b = any(name in path for name in self.target_modules_bd_b or ())
        validation.require(
            not (in_a and in_b),
            f"use_bdlora: '{path}' matches both target_modules_bd_a and target_modules_bd_b. Remove it from one",
        )
        validation.require(
            in_a or in_b or not self.match_strict,
            f"use_bdlora: '{path}' matches neither target_modules_bd_a nor target_modules_bd_b. Name it in one of the "
            "two, or choose match_strict=False to give it a plain LoRA",
        )
        if in_a:
            return "A"
        return "B" if in_b else None


class LoraBlocks(LoraLinear):
    """`lora_A` `[r, in / n]` with `lora_B` `[out, r]`, or `[r, in]` with `[out, r / n]`."""

    def __init__(
        self, config: LoraConfig, path: str, width: int, out_width: int, blocks: int, factor: Literal["A", "B"]
    ) -> None:
        shapes = ([width // blocks], [out_width]) if factor == "A" else ([width], [out_width])
        super().__init__(config, path, *shapes, groups=1 if factor == "A" else blocks)
        self.blocks, self.factor = blocks, factor
        if factor == "A":  # whatever init_lora_weights is, as in PEFT
            nn.init.kaiming_uniform_(self.lora_A)
        else:
            nn.init.zeros_(self.lora_B)

    def pair(self) -> tuple[Tensor, Tensor]:
        if self.factor == "A":
            return torch.block_diag(*self.lora_A.chunk(self.blocks)), self.lora_B
        return self.lora_A, torch.block_diag(*self.lora_B.chunk(self.blocks))


def block_adapter(config: LoraConfig, path: str, module: nn.Module) -> LoraBlocks | None:
    """Create the block-diagonal adapter of a linear layer; None if `use_bdlora` gives the layer a plain LoRA."""
    diagonal = nested_config(BlockDiagonal, "use_bdlora", config.use_bdlora)
    factor, n = diagonal.factor(path), diagonal.nblocks
    if factor is None:
        return None
    r = targets.pattern_value(config.rank_pattern, path, config.r)
    width, out_width = targets.sizes(module)
    size, dimension = (width, "inputs") if factor == "A" else (out_width, "outputs")
    validation.require(
        r % n == 0 and size % n == 0,
        f"use_bdlora: nblocks={n} must divide r={r} and the {size} {dimension} of '{path}'",
    )
    return LoraBlocks(config, path, width, out_width, n, factor)


def expand_blocks(values: Mapping[str, Any], path: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write out the block-diagonal factor of a layer in full, for file formats without blocks.

    Args:
        values: the field `use_bdlora`.
        tensors: tensors by their names in PEFT's files, such as `lora_A.weight`.
    """
    diagonal = nested_config(BlockDiagonal, "use_bdlora", values)
    factor = diagonal.factor(path)
    if factor is None:
        return dict(tensors)
    name = f"lora_{factor}.weight"
    return {**tensors, name: torch.block_diag(*tensors[name].chunk(diagonal.nblocks))}
