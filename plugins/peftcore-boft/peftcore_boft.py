"""BOFT (Liu et al. 2023, arXiv 2311.06243): y = g ∘ W (R x) + bias, with R a product of sparse rotations.

    R = Rm ... R2 R1: each rotates blocks of b numbers, neighbours in R1, and in Rᵢ taken from halves of blocks at
                      distance 2ⁱ⁻¹ (a butterfly, as in the FFT), so few parameters rotate all inputs

    x -- R -- W -- · g --- + bias --- y

A block is Cayley's (1 - Q) (1 + Q)⁻¹ with Q = (A - Aᵀ) / 2. Trained: A of each block, zero at the start, and a gain g
for each output, one at the start. The matrix [in, in] is never built. For a convolution W is the matrix [out, in · k],
with k numbers in a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from peftcore_oft import cayley, turned
from torch import Tensor, nn

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
class BOFTConfig(targets.LayersConfig):
    """Config with the field names of Hugging Face PEFT's `BOFTConfig`; fields not listed choose layers.

    Args:
        boft_block_size, boft_block_num: size or number of the blocks; exactly one is 0 and is computed from the other.
            The given one must divide each layer's inputs.
        boft_n_butterfly_factor: rotations in the product; 1: blocks of neighbours only. (PEFT uses 1 for any
            number if its CUDA kernel is not built; such files are read as one rotation.)
        boft_dropout: share of the blocks of one rotation, drawn at each training step, that are left unrotated.
        bias: biases that are also trained: "none", "all", or "boft_only" (of adapted modules).
        init_weights: False: random rotations and gains, so the adapter changes the model from the start.
    """

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0
    bias: Literal["none", "all", "boft_only"] = "none"
    init_weights: bool = True

    kinds = (nn.Conv2d,)

    def __post_init__(self) -> None:
        super().__post_init__()
        size, number = self.boft_block_size, self.boft_block_num
        one = min(size, number) == 0 < max(size, number)
        found = f"found boft_block_size={size}, boft_block_num={number}"
        validation.require(one, f"one of boft_block_size and boft_block_num must be 0, and the other above 0, {found}")
        validation.positive_whole(boft_n_butterfly_factor=self.boft_n_butterfly_factor)
        validation.probability(boft_dropout=self.boft_dropout)

    def misfit(self, path: str, module: nn.Module) -> str | None:
        return targets.odd_convolution(path, module, alike=True, grouped=False)


class Butterflies(nn.Module):
    """Permutations `orders` `[rotations, in]`: indices in x of the blocks' numbers, for all layers of one size."""

    orders: Tensor

    def __init__(self, rotations: int, blocks: int, block_size: int) -> None:
        super().__init__()
        orders = torch.stack([butterfly(i, blocks, block_size) for i in range(rotations)])
        self.register_buffer("orders", orders, persistent=False)


class BOFT(Adapter):
    """`boft_R` `[rotations, blocks, b, b]` and `boft_s` `[out, 1]` of a linear layer."""

    def __init__(self, config: BOFTConfig, butterflies: Butterflies, blocks: int, out_width: int) -> None:
        super().__init__()
        self.dropout, self.butterflies = config.boft_dropout, butterflies
        rotations, width = butterflies.orders.shape
        self.boft_R = nn.Parameter(torch.zeros(rotations, blocks, width // blocks, width // blocks))
        self.boft_s = nn.Parameter(torch.ones(out_width, 1))
        if not config.init_weights:
            nn.init.normal_(self.boft_R, std=0.1)
            nn.init.normal_(self.boft_s, mean=1.0, std=0.1)

    def turns(self) -> Tensor:
        """Return each block's rotation less 1, fp32 `[rotations, blocks, b, b]`."""
        r = self.boft_R.float()
        return cayley((r - r.transpose(-1, -2)) / 2)

    def kept(self) -> Tensor:
        """Return `turns`, with dropout in training."""
        turns = self.turns()
        if self.training and self.dropout:
            shape, device = turns.shape[:2], turns.device
            dropped = torch.randperm(shape[1], device=device) < int(self.dropout * shape[1])
            one = torch.arange(shape[0], device=device) == torch.randint(shape[0], (), device=device)
            turns = turns * ~(one[:, None] & dropped)[:, :, None, None]
        return turns

    def forward(self, base: Base, x: Tensor) -> Tensor:
        turns = self.kept()
        operands = base.linear_operands(x)
        bias = base.weight_and_bias()[1] if operands is None else operands[1]
        orders = self.butterflies.orders.to(x.device)
        for order, rotation in reversed(list(zip(orders, turns.to(x.dtype), strict=True))):
            x = self.turned(x, order, rotation)
        gain = self.boft_s.flatten().float()
        y = base(x) * gain.to(x.dtype)
        return y if bias is None else y + ((1 - gain) * bias).to(x.dtype)

    def turned(self, x: Tensor, order: Tensor, rotation: Tensor) -> Tensor:
        """Return x `[..., in]` after one rotation of the product."""
        if len(self.boft_R) == 1:  # blocks of neighbours
            return x + turned(x, rotation)
        return x + torch.zeros_like(x).index_copy(-1, order, turned(x.index_select(-1, order), rotation))

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.changed(weight, self.turns()), bias

    def changed(self, weight: Tensor, turns: Tensor) -> Tensor:
        """Return g ∘ W R, fp32."""
        matrix = weight.flatten(1)
        for order, rotation in zip(self.butterflies.orders.to(weight.device), turns.transpose(-1, -2), strict=True):
            matrix = self.turned(matrix, order, rotation)
        return (self.boft_s.flatten().float()[:, None] * matrix).view_as(weight)


class BOFTConv(BOFT):
    """BOFT of a convolution, with `boft_s` `[1, out]`."""

    def __init__(self, config: BOFTConfig, butterflies: Butterflies, blocks: int, out_width: int) -> None:
        super().__init__(config, butterflies, blocks, out_width)
        self.boft_s = nn.Parameter(self.boft_s.detach().T)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        weight = base.weight().float()
        change = self.changed(weight, self.kept()) - weight
        y: Tensor = base(x) + base.module._conv_forward(x, change.to(x.dtype), None)
        return y


def butterfly(i: int, blocks: int, block_size: int) -> Tensor:
    """Return the permutation of rotation i, counted from 0: blocks are made of two halves at distance 2ⁱ."""
    order = torch.arange(2 * blocks).view(-1, 2, 2**i).transpose(1, 2).flatten()
    width = block_size // 2
    return (order[:, None] * width + torch.arange(width)).flatten() if i else torch.arange(blocks * block_size)


def place(model: nn.Module, config: BOFTConfig, architecture: Architecture) -> list[Placement]:
    layers = config.selected(model, architecture)
    placed: list[Placement] = []
    butterflies: dict[int, Butterflies] = {}
    for path, module in layers.items():
        width, out_width = targets.sizes(module)
        given, m = config.boft_block_num or config.boft_block_size, config.boft_n_butterfly_factor
        name = "boft_block_num" if config.boft_block_num else "boft_block_size"
        validation.require(width % given == 0, f"{name}={given} does not divide the {width} inputs of '{path}'")
        blocks, size = (given, width // given) if config.boft_block_num else (width // given, given)
        fits = m == 1 or (size % 2 == 0 and blocks % 2 ** (m - 1) == 0)
        validation.require(
            fits,
            f"boft_n_butterfly_factor={m} needs blocks of an even size, and a multiple of {2 ** (m - 1)} of them; "
            f"'{path}' has {blocks} blocks of {size}. Choose another boft_block_size",
        )
        butterflies[width] = butterflies.get(width) or Butterflies(m, blocks, size)
        kind = BOFTConv if isinstance(module, nn.Conv2d) else BOFT
        placed.append(Around(path, kind(config, butterflies[width], blocks, out_width)))
    return placed + targets.trained_biases(model, config.bias, layers)


def read(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    """Read the number of rotations from the tensors, since PEFT without its CUDA kernel trains only one."""
    rotations = {tensor.shape[:1] for name, tensor in tensors.items() if name.endswith(".boft_R")}
    return tensors, {**fields, "boft_n_butterfly_factor": 1} if rotations == {(1,)} else fields


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(peft_type="BOFT", read=read, peft=PeftRules(unreadable=targets.conv1d_paths))
    return [Method("boft", BOFTConfig, place, rules, learning_rate=3e-3)]
