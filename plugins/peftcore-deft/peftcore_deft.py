"""DEFT (Kumar et al. 2025, arXiv 2509.22793): y = (W - Q pᵀ W + s · Q R) x + b replaces a subspace of W's outputs.

    W x ---+------------------(-)---(+)--- + b --- y
           '--- pᵀ ---- Q -----'     |            P [out, r], R [r, in], trained
     x --------- R ---- s · Q -------'            "relu": Q = P, p = relu(P);  "qr": Q = p, orthogonal, with P's span

At the start s · R = pᵀ W, which adds the removed part back. With `para` there is no R.
"""

from __future__ import annotations

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
    Method,
    Placement,
    StateRules,
    hookimpl,
    inside_at,
    override,
    targets,
    validation,
)

peftcore_api = ">=3.0,<4"


@dataclass(frozen=True)
class DeftConfig(targets.LayersConfig):
    """Config with the field names of Hugging Face PEFT's `DeftConfig`; the other fields are LoRA's.

    Args:
        r: dimension of the subspace, at most the number of a layer's outputs.
        alpha: s = alpha / r; None: s = 1.
        para: only remove the subspace, without R.
        deft_dropout: dropout probability of the inputs of R.
        init_weights: False: R is normal, with standard deviation 0.02 · init_scale.
    """

    r: int = 8
    decomposition_method: Literal["relu", "qr"] = "relu"
    init_scale: float = 1.0
    alpha: int | None = None
    para: bool = False
    deft_dropout: float = 0.0
    init_weights: bool = True
    bias: Literal["none", "all", "deft_only"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.positive_whole(r=self.r)
        validation.probability(deft_dropout=self.deft_dropout)


class Deft(Adapter):
    """Trained P and R of a linear layer; x `[..., in]` -> y `[..., out]`."""

    def __init__(self, config: DeftConfig, width: int, out_width: int) -> None:
        super().__init__()
        r = min(config.r, out_width)
        self.orthogonal, self.scale = config.decomposition_method == "qr", config.alpha / r if config.alpha else 1.0
        self.dropout = nn.Dropout(config.deft_dropout)
        self.deft_P = nn.Parameter(0.02 * torch.randn(out_width, r))
        initial_r = 0.02 * config.init_scale * torch.randn(r, width)
        self.deft_R = None if config.para else nn.Parameter(initial_r)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y, bias = base(x), base.weight_and_bias()[1]
        q, p = (t.to(y.dtype) for t in self.directions())
        u = -(y if bias is None else y - bias.to(y.dtype)) @ p
        if self.deft_R is not None:
            u = u + self.scale * F.linear(self.dropout(x), self.deft_R.to(x.dtype))
        return y + F.linear(u, q)

    def directions(self) -> tuple[Tensor, Tensor]:
        """Return Q and p, `[out, r]`."""
        if self.orthogonal:
            q = torch.linalg.qr(self.deft_P.float())[0]
            return q, q
        return self.deft_P, self.deft_P.relu()

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        q, p = self.directions()
        q, p = q.to(weight.dtype), p.to(weight.dtype)
        inner = -(p.T @ weight)
        if self.deft_R is not None:
            inner = inner + self.scale * self.deft_R.to(weight.dtype)
        return weight + q @ inner, bias


def place(model: nn.Module, config: DeftConfig, architecture: Architecture) -> list[Placement]:
    layers = {path: targets.sizes(module) for path, module in config.selected(model, architecture).items()}
    placements: list[Any] = [Around(path, Deft(config, *sizes)) for path, sizes in layers.items()]
    return placements + targets.trained_biases(model, config.bias, layers)


def initialize(model: nn.Module, adapters: Mapping[str, Any], config: DeftConfig, batches: Any) -> None:
    """Set R to add the removed part back; the training batches are not used."""
    for path, adapter in adapters.items():
        weight = inside_at(model, path).weight().float()
        adapter.deft_R.copy_(adapter.directions()[1].float().T @ weight / adapter.scale)


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(peft_type="DEFT")
    initializes = lambda config: config.init_weights and not config.para  # noqa: E731
    return [Method("deft", DeftConfig, place, rules, initialize, initializes=initializes, learning_rate=1e-3)]
