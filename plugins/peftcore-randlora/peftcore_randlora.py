"""RandLoRA (Albert et al. 2025, arXiv 2502.00987): a full-rank update y = W x + b + s · Σ_n B_n L_n A G_n x.

    A [r, small]      random and frozen, shared by all layers, which take slices of them; `small` and `large`
    B_n [large, r]    are the smaller and the larger size of a layer, and n runs to small / r
    L_n, G_n          trained diagonals lambda `[r]`, zero at the start, and gamma `[small]`
    s                 randlora_alpha / r

If a layer has fewer outputs than inputs, the product is transposed. PEFT numbers the pairs (n, i), with i of the r
rows, as i · n_max + n in A but as n · r + i in B, so that row i of A L_n G_n meets a different column of B than in the
formula. peftcore does the same, for compatible files; the columns are random either way.
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
        r: rank of each product. A smaller r means more products and more trained parameters.
        projection_prng_key: seed of A and B.
        save_projection: save A and B; otherwise loading draws them again.
        sparse, very_sparse: draw A and B from -1, 0 and 1, then scale them; a third of the entries is nonzero, or the
            share 1 / sqrt(small).
        init_weights: False: random lambda; the adapter then changes the model from the start.
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
                values = draw(config, shape, math.sqrt(small) if config.very_sparse else 3.0, generator)
            self.register_buffer(name, values, persistent=config.save_projection)


def draw(config: RandLoraConfig, shape: tuple[int, int, int], sparsity: float, generator: torch.Generator) -> Tensor:
    """Draw matrices as PEFT does, on the CPU; dense ones in bfloat16, one product after the other."""
    if config.sparse or config.very_sparse:
        uniform, share = torch.rand(shape, generator=generator, device="cpu"), 1 / (2 * sparsity)
        values = (uniform > 1 - share).float() - (uniform < share).float()
    else:
        bound = 1 / math.sqrt(shape[2])
        parts = [torch.empty(shape[0], 1, shape[2], dtype=torch.bfloat16, device="cpu") for _ in range(shape[1])]
        values = torch.cat([part.uniform_(-bound, bound, generator=generator) for part in parts], dim=1)
    return (values / values.std()).float()


class Scaled(torch.autograd.Function):
    """Computes lambda `[r, n]` · A `[r, small]` · gamma `[n, small]`, as `[r, n, small]`; saves only its inputs."""

    @staticmethod
    def forward(ctx: Any, diagonal: Tensor, a: Tensor, gamma: Tensor) -> Tensor:
        ctx.save_for_backward(diagonal, a, gamma)
        return (diagonal[:, :, None] * a[:, None]).mul_(gamma)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        diagonal, a, gamma = ctx.saved_tensors
        grad_a = grad * a[:, None]
        return torch.einsum("rns,ns->rn", grad_a, gamma), None, torch.einsum("rns,rn->ns", grad_a, diagonal)


class RandLora(Adapter):
    """lambda `[r, n]` and gamma `[n, small]` of a linear layer; x `[..., in]` -> y `[..., out]`."""

    def __init__(self, config: RandLoraConfig, bases: Bases, width: int, out_width: int) -> None:
        super().__init__()
        self.small, self.large = min(width, out_width), max(width, out_width)
        self.is_transposed = out_width < width
        self.bases, self.scale = bases, config.randlora_alpha / config.r
        self.dropout, count = nn.Dropout(config.randlora_dropout), math.ceil(self.small / config.r)
        identity_init = config.init_weights
        self.randlora_lambda = nn.Parameter((torch.zeros if identity_init else torch.randn)(config.r, count))
        size = max(count, self.small) if identity_init else self.large
        self.randlora_gamma = nn.Parameter(torch.full((count, self.small), 1 / size))

    def forward(self, base: Base, x: Tensor) -> Tensor:
        a, b = (t.to(x.dtype) for t in self.pair(x.device))
        return base(x) + self.scale * F.linear(F.linear(self.dropout(x), a), b)

    def pair(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the factors, `[r · n, in]` and `[out, r · n]`."""
        a = self.bases.randlora_A[:, 0, : self.small].to(device)
        b = self.bases.randlora_B[: self.large, : len(self.randlora_gamma)].to(device).flatten(1)
        a = Scaled.apply(self.randlora_lambda, a, self.randlora_gamma).flatten(0, 1)  # type: ignore[no-untyped-call]
        return (b.T, a.T) if self.is_transposed else (a, b)

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        a, b = self.pair(weight.device)
        return weight + self.scale * (b.float() @ a.float()), bias


def place(model: nn.Module, config: RandLoraConfig, architecture: Architecture) -> list[Placement]:
    layers = {path: targets.sizes(module) for path, module in config.selected(model, architecture).items()}
    bases = Bases(config, *sorted(max(sizes) for sizes in zip(*layers.values(), strict=True)))
    placements: list[Any] = [Around(path, RandLora(config, bases, *sizes)) for path, sizes in layers.items()]
    return placements + targets.trained_biases(model, config.bias, layers)


def tensor_name(placement: Any, name: str) -> str:
    """Name A and B without a layer, since the file contains them once."""
    return f"base_model.{name.removeprefix('bases.')}" if "bases." in name else plugin.tensor_name(placement, name)


def read(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    """Drop the copies of A and B that PEFT writes for each layer."""

    def is_copy(name: str) -> bool:
        return name.endswith((".randlora_A", ".randlora_B")) and name.count(".") > 1

    kept_tensors = {name: tensor for name, tensor in tensors.items() if not is_copy(name)}
    for name in tensors.keys() - kept_tensors.keys():
        shared = tensors.get(f"base_model.{name.rpartition('.')[2]}")
        is_equal = shared is not None and torch.equal(shared, tensors[name])
        validation.require(
            is_equal, f"'{name}' differs from the matrix that all layers share. Save the file again with PEFT"
        )
    return kept_tensors, fields


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(
        peft_type="RANDLORA", tensor_name=tensor_name, read=read, peft=PeftRules(own_fields=RandLoraConfig.not_in_peft)
    )
    return [Method("randlora", RandLoraConfig, place, rules, learning_rate=1e-3)]
