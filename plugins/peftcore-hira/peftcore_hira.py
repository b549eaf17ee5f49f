"""HiRA (Huang et al. 2025, ICLR, "Hadamard high-rank adaptation"): y = (W + W ⊙ B A) x + b, with ⊙ elementwise.

x ---+--- W ----------(+)--- + b --- y        A [r, in] and B [out, r] are trained; B is zero at the start
     '--- W ⊙ B A ---- '                      the change can have rank r · rank(W)

For a convolution with kernel k, A is [r, in, k] and B mixes the r channels. For an embedding A is [r, tokens] and zero
at the start, instead of B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

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
    odd_embedding,
    override,
    targets,
    validation,
)

peftcore_api = ">=3.0,<4"


@dataclass(frozen=True)
class HiraConfig(targets.LayersConfig):
    """Config with the field names of Hugging Face PEFT's `HiraConfig`; the other fields are LoRA's.

    Args:
        hira_dropout: dropout probability of the inputs of W ⊙ B A, except for embeddings.
        init_weights: True: A is drawn as in LoRA. "gaussian": in linear layers, A has standard deviation 1 / r.
            False: A and B are random.
        rank_pattern: ranks of single layers, by suffix of their path or by regular expression.
    """

    r: int = 32
    hira_dropout: float = 0.0
    init_weights: bool | Literal["gaussian"] | None = True
    rank_pattern: dict[str, int] | None = None

    kinds = nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.positive_whole(r=self.r, **(self.rank_pattern or {}))
        validation.probability(hira_dropout=self.hira_dropout)

    def misfit(self, path: str, module: nn.Module) -> str | None:
        return odd_embedding(path, module) or targets.odd_convolution(path, module, grouped=False)


class Hira(Adapter):
    """A and B of a linear layer; x `[..., in]` -> y `[..., out]`."""

    def __init__(self, config: HiraConfig, r: int, width: int, out_width: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.hira_dropout)
        self.hira_A = nn.Parameter(torch.randn(r, width))
        self.hira_B = nn.Parameter(torch.zeros(out_width, r) if config.init_weights else torch.randn(out_width, r))
        if config.init_weights is True:
            nn.init.kaiming_uniform_(self.hira_A, a=math.sqrt(5))
        elif config.init_weights:
            nn.init.normal_(self.hira_A, std=1 / r)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        weight, bias = base.linear_operands(x) or (None, None)
        has_dropout = self.training and self.dropout.p > 0
        if isinstance(weight, Tensor) and weight.dtype == torch.float32 and not has_dropout:
            return F.linear(x, self.merged(weight, bias)[0], bias)
        return base(x) + F.linear(self.dropout(x), self.change(base.weight()).to(x.dtype))

    def product(self) -> Tensor:
        """Return B A in the shape of the weight, fp32."""
        return self.hira_B.float() @ self.hira_A.float()

    def change(self, weight: Tensor) -> Tensor:
        return weight * self.product()

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.change(weight), bias

    @override
    def neutral(self) -> dict[str, Tensor]:
        return {"hira_B": torch.zeros_like(self.hira_B)}


class HiraConv(Hira):
    """A `[r, in, k]` and B `[out, r, 1]` of a convolution; in 2-D `[r, in, k, k]` and `[out, r, 1, 1]`."""

    def __init__(self, config: HiraConfig, r: int, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        super().__init__(config, r, *targets.sizes(layer))
        self.hira_A = nn.Parameter(torch.randn(r, *layer.weight.shape[1:]))
        self.hira_B = nn.Parameter(self.hira_B.detach().view(-1, r, *[1] * len(layer.kernel_size)))
        if config.init_weights:
            nn.init.kaiming_uniform_(self.hira_A, a=math.sqrt(5))

    def product(self) -> Tensor:
        return (self.hira_B.float().flatten(1) @ self.hira_A.float().flatten(1)).unflatten(1, self.hira_A.shape[1:])

    def forward(self, base: Base, x: Tensor) -> Tensor:
        change = self.change(base.weight()).to(x.dtype)
        y: Tensor = base(x) + base.module._conv_forward(self.dropout(x), change, None)
        return y


class HiraEmbedding(Adapter):
    """A and B of an embedding: `hira_embedding_A` `[r, tokens]` and `hira_embedding_B` `[width, r]`."""

    def __init__(self, config: HiraConfig, r: int, layer: nn.Embedding) -> None:
        super().__init__()
        tokens, width = targets.sizes(layer)
        self.hira_embedding_A = nn.Parameter((torch.zeros if config.init_weights else torch.randn)(r, tokens))
        self.hira_embedding_B = nn.Parameter(torch.randn(width, r))

    def forward(self, base: Base, tokens: Tensor) -> Tensor:
        if tokens.is_floating_point():  # weights of a mixture of rows, as in Ovis
            output: Tensor = base.on_weights({"weight": lambda weight: self.merged(weight, None)[0]})(tokens)
            return output
        y = base(tokens)
        product = F.linear(F.embedding(tokens, self.hira_embedding_A.T), self.hira_embedding_B)  # B A at these tokens
        return (y + y * product).to(y.dtype)

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + weight * (self.hira_embedding_B.float() @ self.hira_embedding_A.float()).T, bias

    @override
    def neutral(self) -> dict[str, Tensor]:
        return {"hira_embedding_A": torch.zeros_like(self.hira_embedding_A)}


def place(model: nn.Module, config: HiraConfig, architecture: Architecture) -> list[Placement]:
    layers = config.selected(model, architecture)
    return [Around(path, adapter_for(config, path, module)) for path, module in layers.items()]


def adapter_for(config: HiraConfig, path: str, module: nn.Module) -> nn.Module:
    r = targets.pattern_value(config.rank_pattern, path, config.r)
    if isinstance(module, nn.Embedding):
        return HiraEmbedding(config, r, module)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return HiraConv(config, r, module)
    return Hira(config, r, *targets.sizes(module))


def refusal(model: nn.Module, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> str | None:
    """Return why a file cannot be loaded, or None. PEFT 0.21 writes rank_pattern, but gives every layer rank r."""
    names = (".hira_A", ".hira_embedding_A")
    r, ranks = fields.get("r", 32), {len(tensor) for name, tensor in tensors.items() if name.endswith(names)}
    if ranks != {r} or set((fields.get("rank_pattern") or {}).values()) <= {r}:
        return None
    return f"its rank_pattern does not match its tensors, which all have rank {r}. Remove it from adapter_config.json"


def write(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    return tensors, {**fields, "rank_pattern": fields["rank_pattern"] or {}}


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(peft_type="HIRA", write=write, peft=PeftRules(refused=refusal))
    return [Method("hira", HiraConfig, place, rules, learning_rate=1e-2)]
