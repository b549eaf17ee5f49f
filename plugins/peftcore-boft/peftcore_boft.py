"""BOFT (Liu et al. 2023, arXiv 2311.06243): y = g ∘ W (R x) + bias, with R a product of sparse rotations.

    R = Rm ... R2 R1: each factor rotates blocks of b numbers. R1's blocks are adjacent numbers; a block of Rᵢ joins two
                      half blocks at distance 2ⁱ⁻¹ (a butterfly, as in the FFT), so few parameters mix all inputs

    x -- R -- W -- · g --- + bias --- y

Each block is a Cayley transform (1 - Q) (1 + Q)⁻¹ with Q = (A - Aᵀ) / 2. A of each block, initially zero, and a gain g
per output, initially one, are trained. No [in, in] matrix is built. For a convolution W is the matrix [out, in · k],
with k numbers in a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from peftcore_oft import cayley, rotate_blocks
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
    """Config with the field names of Hugging Face PEFT's `BOFTConfig`; the other fields select layers.

    Args:
        boft_block_size, boft_block_num: size or number of the blocks. One is 0 and computed from the other, which
            must divide the number of each layer's inputs.
        boft_n_butterfly_factor: number of rotations in the product. (Without its CUDA kernel, PEFT trains only one
            for any value; such a file loads as one rotation.)
        boft_dropout: in training, one rotation is drawn per step and leaves this share of its blocks unrotated.
        bias: biases to train as well: "none", "all", or "boft_only" (of adapted modules).
        init_weights: False: random rotations and gains; the adapter then changes the model from the start.
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
        exactly_one = min(size, number) == 0 < max(size, number)
        values = f"found boft_block_size={size}, boft_block_num={number}"
        validation.require(
            exactly_one, f"one of boft_block_size and boft_block_num must be 0 and the other positive, {values}"
        )
        validation.positive_whole(boft_n_butterfly_factor=self.boft_n_butterfly_factor)
        validation.probability(boft_dropout=self.boft_dropout)

    def misfit(self, path: str, module: nn.Module) -> str | None:
        return targets.odd_convolution(path, module, alike=True, grouped=False)


class Butterflies(nn.Module):
    """Permutations `orders` `[rotations, in]` that make each block contiguous; layers of one width share them."""

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

    def rotation_deltas(self) -> Tensor:
        """Return R - 1 of each block, fp32 `[rotations, blocks, b, b]`."""
        r = self.boft_R.float()
        return cayley((r - r.transpose(-1, -2)) / 2)

    def rotation_deltas_with_dropout(self) -> Tensor:
        """Return `rotation_deltas`, in training with zeros for the dropped blocks."""
        deltas = self.rotation_deltas()
        if self.training and self.dropout:
            rotations, blocks = deltas.shape[:2]
            block_mask = torch.randperm(blocks, device=deltas.device) < int(self.dropout * blocks)
            rotation = torch.randint(rotations, (), device=deltas.device)
            rotation_mask = torch.arange(rotations, device=deltas.device) == rotation
            deltas = deltas * ~(rotation_mask[:, None] & block_mask)[:, :, None, None]
        return deltas

    def forward(self, base: Base, x: Tensor) -> Tensor:
        deltas = self.rotation_deltas_with_dropout()
        operands = base.linear_operands(x)
        bias = base.weight_and_bias()[1] if operands is None else operands[1]
        orders = self.butterflies.orders.to(x.device)
        for order, delta in reversed(list(zip(orders, deltas.to(x.dtype), strict=True))):
            x = self.rotated(x, order, delta)
        # base(x) has the bias in it, which the gain must not scale.
        gain = self.boft_s.flatten().float()
        y = base(x) * gain.to(x.dtype)
        return y if bias is None else y + ((1 - gain) * bias).to(x.dtype)

    def rotated(self, x: Tensor, order: Tensor, delta: Tensor) -> Tensor:
        """Return x `[..., in]` after one rotation of the product, given as R - 1 of its blocks."""
        if len(self.boft_R) == 1:  # adjacent numbers, so no permutation is needed
            return x + rotate_blocks(x, delta)
        return x + torch.zeros_like(x).index_copy(-1, order, rotate_blocks(x.index_select(-1, order), delta))

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.adapted_weight(weight, self.rotation_deltas()), bias

    def adapted_weight(self, weight: Tensor, deltas: Tensor) -> Tensor:
        """Return g ∘ W R, fp32."""
        matrix = weight.flatten(1)
        for order, delta in zip(self.butterflies.orders.to(weight.device), deltas.transpose(-1, -2), strict=True):
            matrix = self.rotated(matrix, order, delta)
        return (self.boft_s.flatten().float()[:, None] * matrix).view_as(weight)


class BOFTConv(BOFT):
    """BOFT of a convolution, with `boft_s` `[1, out]`."""

    def __init__(self, config: BOFTConfig, butterflies: Butterflies, blocks: int, out_width: int) -> None:
        super().__init__(config, butterflies, blocks, out_width)
        self.boft_s = nn.Parameter(self.boft_s.detach().T)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        weight = base.weight().float()
        change = self.adapted_weight(weight, self.rotation_deltas_with_dropout()) - weight
        y: Tensor = base(x) + base.module._conv_forward(x, change.to(x.dtype), None)
        return y


def butterfly(i: int, blocks: int, block_size: int) -> Tensor:
    """Return the permutation of rotation i (0-based), whose blocks join two half blocks at distance 2ⁱ."""
    if i == 0:
        return torch.arange(blocks * block_size)
    order = torch.arange(2 * blocks).view(-1, 2, 2**i).transpose(1, 2).flatten()
    half = block_size // 2
    return (order[:, None] * half + torch.arange(half)).flatten()


def place(model: nn.Module, config: BOFTConfig, architecture: Architecture) -> list[Placement]:
    layers = config.selected(model, architecture)
    placements: list[Placement] = []
    butterflies: dict[int, Butterflies] = {}
    for path, module in layers.items():
        width, out_width = targets.sizes(module)
        setting, rotations = config.boft_block_num or config.boft_block_size, config.boft_n_butterfly_factor
        name = "boft_block_num" if config.boft_block_num else "boft_block_size"
        validation.require(width % setting == 0, f"{name}={setting} does not divide the {width} inputs of '{path}'")
        blocks, size = (setting, width // setting) if config.boft_block_num else (width // setting, setting)
        fits = rotations == 1 or (size % 2 == 0 and blocks % 2 ** (rotations - 1) == 0)
        validation.require(
            fits,
            f"boft_n_butterfly_factor={rotations} needs an even block size and a number of blocks divisible by "
            f"{2 ** (rotations - 1)}, but '{path}' has {blocks} blocks of {size}. Choose another boft_block_size",
        )
        butterflies[width] = butterflies.get(width) or Butterflies(rotations, blocks, size)
        adapter_class = BOFTConv if isinstance(module, nn.Conv2d) else BOFT
        placements.append(Around(path, adapter_class(config, butterflies[width], blocks, out_width)))
    return placements + targets.trained_biases(model, config.bias, layers)


def read(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    """Take the number of rotations from the tensors: without its CUDA kernel, PEFT trains one, whatever the config."""
    rotations = {tensor.shape[:1] for name, tensor in tensors.items() if name.endswith(".boft_R")}
    return tensors, {**fields, "boft_n_butterfly_factor": 1} if rotations == {(1,)} else fields


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(peft_type="BOFT", read=read, peft=PeftRules(unreadable=targets.conv1d_paths))
    return [Method("boft", BOFTConfig, place, rules, learning_rate=3e-3)]
