"""GraLoRA (Jung et al. 2025, arXiv 2505.20355): y = W x + b + s · G x, where G has k · k blocks of rank r / k.

    x_1 --- A_1 --- u_11 | u_12        A_n [in / k, r] maps part n of the input to k pieces of r / k numbers. Piece j
    x_2 --- A_2 --- u_21 | u_22        goes to part j of the output, where B_j [r, out / k] reads one piece of each n.
                      |      |
                     B_1    B_2        s = alpha / (r + hybrid_r)
                      |      |
                     y_1    y_2        hybrid_r > 0: an ordinary low-rank product of that rank is added

It has as many parameters as LoRA of rank r. An outlier in one part of x affects only the blocks of that part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.plugin import (
    Adapter,
    Architecture,
    Around,
    Base,
    Method,
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
class GraloraConfig(targets.LayersConfig):
    """Config with the field names of Hugging Face PEFT's `GraloraConfig`; the other fields are LoRA's.

    Args:
        r: rank, a multiple of gralora_k.
        hybrid_r: rank of the additional low-rank product; 0: none.
        gralora_k: k, which must divide the inputs and outputs of all layers.
        init_weights: False: B is random too; the adapter then changes the model from the start.
    """

    r: int = 32
    hybrid_r: int = 0
    alpha: int = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2
    bias: Literal["none", "all", "gralora_only"] = "none"
    init_weights: bool = True

    not_in_peft = frozenset({"exclude_modules"})

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.positive_whole(r=self.r, gralora_k=self.gralora_k)
        validation.probability(gralora_dropout=self.gralora_dropout)
        validation.require(self.hybrid_r >= 0, f"hybrid_r must not be negative, found {self.hybrid_r}")
        message = f"r={self.r} must be a multiple of gralora_k={self.gralora_k}"
        validation.require(self.r % self.gralora_k == 0, message)

    def misfit(self, path: str, module: nn.Module) -> str | None:
        sizes = targets.sizes(module)
        if not any(size % self.gralora_k for size in sizes):
            return None
        reason = f"gralora_k={self.gralora_k} must divide inputs and outputs of '{path}': {sizes}"
        return f"{reason}. Choose another gralora_k, or exclude the layer: exclude_modules=[...]"


class Gralora(Adapter):
    """A `[k, in / k, r]` and B `[k, r, out / k]`; the additional product is `[hybrid_r, in]` and `[out, hybrid_r]`."""

    def __init__(self, config: GraloraConfig, width: int, out_width: int) -> None:
        super().__init__()
        k, r, random_b = config.gralora_k, config.r, not config.init_weights
        self.scale = config.alpha / (r + config.hybrid_r)
        self.dropout = nn.Dropout(config.gralora_dropout)
        self.gralora_A = nn.Parameter(kaiming(k, r, width // k).transpose(1, 2).contiguous())
        b = kaiming(k, out_width // k, r) if random_b else torch.zeros(k, out_width // k, r)
        self.gralora_B = nn.Parameter(b.transpose(1, 2).contiguous())
        self.gralora_A_general: nn.Linear | None = None
        self.gralora_B_general: nn.Linear | None = None
        if config.hybrid_r:
            self.gralora_A_general = nn.Linear(width, config.hybrid_r, bias=False)
            self.gralora_B_general = nn.Linear(config.hybrid_r, out_width, bias=False)
            if not random_b:
                nn.init.zeros_(self.gralora_B_general.weight)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y, x = base(x), self.dropout(x)
        k, a, b = len(self.gralora_A), self.gralora_A.to(x.dtype), self.gralora_B.to(x.dtype)
        u = torch.einsum("...ni,nir->...nr", x.unflatten(-1, (k, -1)), a)
        pieces = u.unflatten(-1, (k, -1)).transpose(-3, -2).flatten(-2)  # [..., j, r]: piece j of each part n
        change = torch.einsum("...jr,jro->...jo", self.scale * pieces, b).flatten(-2)
        if self.gralora_A_general is not None:
            a_general, b_general = self.general_factors()
            change = change + F.linear(F.linear(x, (self.scale * a_general).to(x.dtype)), b_general.to(x.dtype))
        return y + change

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        k = len(self.gralora_A)
        a = self.gralora_A.float().unflatten(-1, (k, -1))  # [n, in / k, j, r / k]
        b = self.gralora_B.float().unflatten(1, (k, -1))  # [j, n, r / k, out / k]
        change = torch.einsum("nijq,jnqo->joni", a, b).flatten(2).flatten(0, 1)
        if self.gralora_A_general is not None:
            a_general, b_general = self.general_factors()
            change = change + b_general.float() @ a_general.float()
        return weight + self.scale * change, bias

    def general_factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B of the additional product."""
        assert self.gralora_A_general is not None and self.gralora_B_general is not None
        return self.gralora_A_general.weight, self.gralora_B_general.weight


def kaiming(*shape: int) -> Tensor:
    """Return a stack of matrices, each initialised on its own, as in PEFT."""
    matrices = torch.empty(shape)
    for matrix in matrices:
        nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
    return matrices


def place(model: nn.Module, config: GraloraConfig, architecture: Architecture) -> list[Placement]:
    layers = {path: targets.sizes(module) for path, module in config.selected(model, architecture).items()}
    placements = [Around(path, Gralora(config, *sizes)) for path, sizes in layers.items()]
    return [*placements, *targets.trained_biases(model, config.bias, layers)]


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(peft_type="GRALORA", peft=PeftRules(own_fields=GraloraConfig.not_in_peft))
    return [Method("gralora", GraloraConfig, place, rules, learning_rate=1e-3)]
