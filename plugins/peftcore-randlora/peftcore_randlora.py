"""RandLoRA (Albert et al. 2025, arXiv 2502.00987): y = W x + b + s · sum over n of B_n L_n A G_n x, of full rank.

    A [r, small]      random, frozen, one pair for all layers, which use as much of it as they need; `small` and
    B_n [large, r]    `large` are the smaller and the larger of a layer's sizes, and n goes up to small / r
    L_n, G_n          diagonals `[r]` and `[small]`, trained: lambda, zero at the start, and gamma
    s                 randlora_alpha / r

Where a layer's output is smaller than its input, the product is transposed. PEFT numbers the pairs (n, i), i of the r
rows, as i · n_max + n in A and as n · r + i in B, so row i of A L_n G_n is paired with another column of B than in the
formula. This is the same here, for compatible files; the columns are random either way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore import plugin
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
class RandLoraConfig(targets.LayersConfig):
    """Config with the field names of Hugging Face PEFT's `RandLoraConfig`; the other fields are LoRA's.

    Args:
        r: rank of a product. A smaller r means more products and more trained parameters.
        projection_prng_key: seed of A and B. save_projection: save them; otherwise they are drawn again on load.
        sparse, very_sparse: A and B of -1, 0 and 1 (then scaled), with a third, or 1 / sqrt(small), of them non-zero.
        init_weights: False: lambda is random, so the adapter changes the model from the start.
    """

    r: int = 32
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    randlora_alpha: int = 640
    bias: Literal["none", "all", "randlora_only"] = "none"
    init_weights: bool = True

    not_in_peft = frozenset({"exclude_modules"})

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.positive_whole(r=self.r)
        validation.probability(randlora_dropout=self.randlora_dropout)


class Bases(nn.Module):
    """A `[r, 1, small]` and B `[large, n, r]`, one pair for all layers, with standard deviation 1."""

    randlora_A: Tensor
    randlora_B: Tensor

    def __init__(self, config: RandLoraConfig, small: int, large: int) -> None:
        super().__init__()
        shapes = ((config.r, 1, small), (large, math.ceil(small / config.r), config.r))
        generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
        for name, shape in zip(("randlora_A", "randlora_B"), shapes, strict=True):
            values = torch.empty(shape)
            if not values.is_meta:
                values = drawn(config, shape, math.sqrt(small) if config.very_sparse else 3.0, generator)
            self.register_buffer(name, values, persistent=config.save_projection)


def drawn(config: RandLoraConfig, shape: tuple[int, int, int], sparsity: float, generator: torch.Generator) -> Tensor:
    """Return matrices drawn as in PEFT, on the CPU: dense ones in bfloat16, one product after the other."""
    if config.sparse or config.very_sparse:
        uniform, share = torch.rand(shape, generator=generator, device="cpu"), 1 / (2 * sparsity)
        values = (uniform > 1 - share).float() - (uniform < share).float()
    else:
        bound = 1 / math.sqrt(shape[2])
        parts = [torch.empty(shape[0], 1, shape[2], dtype=torch.bfloat16, device="cpu") for _ in range(shape[1])]
        values = torch.cat([part.uniform_(-bound, bound, generator=generator) for part in parts], dim=1)
    return (values / values.std()).float()


class Scaled(torch.autograd.Function):
    """lambda `[r, n]`, A `[r, small]`, gamma `[n, small]` -> lambda · A · gamma, `[r, n, small]`; saves its inputs."""

    @staticmethod
    def forward(ctx: Any, by: Tensor, a: Tensor, gamma: Tensor) -> Tensor:
        ctx.save_for_backward(by, a, gamma)
        return (by[:, :, None] * a[:, None]).mul_(gamma)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        by, a, gamma = ctx.saved_tensors
        of_a = grad * a[:, None]
        return torch.einsum("rns,ns->rn", of_a, gamma), None, torch.einsum("rns,rn->ns", of_a, by)


class RandLora(Adapter):
    """lambda `[r, n]` and gamma `[n, small]` of a linear layer; x `[..., in]` -> y `[..., out]`."""

    def __init__(self, config: RandLoraConfig, bases: Bases, width: int, out_width: int) -> None:
        super().__init__()
        self.of_input, self.small, self.large = width <= out_width, min(width, out_width), max(width, out_width)
        self.bases, self.scale = bases, config.randlora_alpha / config.r
        self.dropout, count = nn.Dropout(config.randlora_dropout), math.ceil(self.small / config.r)
        start = config.init_weights
        self.randlora_lambda = nn.Parameter((torch.zeros if start else torch.randn)(config.r, count))
        size = max(count, self.small) if start else self.large
        self.randlora_gamma = nn.Parameter(torch.full((count, self.small), 1 / size))

    def forward(self, base: Base, x: Tensor) -> Tensor:
        first, second = (t.to(x.dtype) for t in self.pair(x.device))
        return base(x) + self.scale * F.linear(F.linear(self.dropout(x), first), second)

    def pair(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the factors, `[r · n, in]` and `[out, r · n]`."""
        a = self.bases.randlora_A[:, 0, : self.small].to(device)
        b = self.bases.randlora_B[: self.large, : len(self.randlora_gamma)].to(device).flatten(1)
        a = Scaled.apply(self.randlora_lambda, a, self.randlora_gamma).flatten(0, 1)  # type: ignore[no-untyped-call]
        return (a, b) if self.of_input else (b.T, a.T)

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        first, second = self.pair(weight.device)
        return weight + self.scale * (second.float() @ first.float()), bias


def place(model: nn.Module, config: RandLoraConfig, architecture: Architecture) -> list[Placement]:
    layers = {path: targets.sizes(module) for path, module in config.selected(model, architecture).items()}
    bases = Bases(config, *sorted(max(sizes) for sizes in zip(*layers.values(), strict=True)))
    placements: list[Any] = [Around(path, RandLora(config, bases, *sizes)) for path, sizes in layers.items()]
    return placements + targets.trained_biases(model, config.bias, layers)


def tensor_name(placement: Any, name: str) -> str:
    """Name A and B without a layer, since a file holds them once."""
    return f"base_model.{name.removeprefix('bases.')}" if "bases." in name else plugin.tensor_name(placement, name)


def read(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    """Leave out A and B of single layers, which PEFT also writes."""
    found = {n: t for n, t in tensors.items() if not n.endswith((".randlora_A", ".randlora_B")) or n.count(".") == 1}
    for name in tensors.keys() - found.keys():
        shared = tensors.get(f"base_model.{name.rpartition('.')[2]}")
        one = shared is not None and torch.equal(shared, tensors[name])
        validation.require(
            one, f"'{name}' differs from the matrix that all layers share. Save the file again with PEFT"
        )
    return found, fields


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(
        peft_type="RANDLORA", tensor_name=tensor_name, read=read, peft=PeftRules(own_fields=RandLoraConfig.not_in_peft)
    )
    return [Method("randlora", RandLoraConfig, place, rules, learning_rate=1e-3)]
