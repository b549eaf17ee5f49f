"""Arrow (Ostapenko et al. 2024, arXiv 2405.11157, section 4.2): route each token to low-rank experts.

    v_e         top right singular vector of B_e A_e: the input direction that expert e amplifies most
    s_e = |v_e · x|                          for each expert and token x
    w   = softmax(s / temperature)           over the top k experts; 0 for the others
    y   = W x + Σ w_e · (expert_e(x) - W x)

The experts are adapters that the model already has, with a product B A at linear layers, such as LoRA. v initialises a
parameter, which is trained unless the adapter is frozen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.plugin import (
    Adapter,
    Architecture,
    Around,
    BranchedBase,
    LowRank,
    Method,
    PeftcoreError,
    Placement,
    StateRules,
    hookimpl,
    implements,
    other_adapter,
    validation,
)

peftcore_api = ">=3.0,<4"

_STEPS = 15  # power iterations; as many as in PEFT, to get the same v


@dataclass(frozen=True)
class ArrowConfig:
    """Config with the field names of Hugging Face PEFT's `ArrowConfig`, plus the experts, which PEFT takes as files.

    Args:
        experts: names of adapters that the model has, all on the same modules.
        top_k: number of experts per token.
        router_temperature: temperature of the softmax over the scores.
        rng_seed: seed for the initial vector of the power iteration. None: random.
    """

    experts: Sequence[str] = ()
    top_k: int = 3
    router_temperature: float = 1.0
    rng_seed: int | None = None

    def __post_init__(self) -> None:
        validation.check_types(self)
        validation.positive_whole(top_k=self.top_k)
        validation.require(
            self.router_temperature > 0, f"router_temperature must be positive, found {self.router_temperature}"
        )
        validation.require(
            self.top_k <= len(self.experts),
            f"top_k={self.top_k} is more than the {len(self.experts)} experts in the config: {list(self.experts)}. "
            "Add experts to experts=[...], or choose a smaller top_k",
        )


class ArrowRouter(Adapter):
    """Router of one layer: `prototypes [experts, in]`, the v of each expert."""

    def __init__(self, config: ArrowConfig, width: int) -> None:
        super().__init__()
        self.experts, self.top_k, self.temperature = tuple(config.experts), config.top_k, config.router_temperature
        self.prototypes = nn.Parameter(torch.zeros(len(self.experts), width))

    def expert_weights(self, x: Tensor) -> Tensor:
        """Return the experts' weights w `[..., experts]` for tokens x `[..., in]`, in the dtype of the prototypes."""
        scores = F.linear(x.to(self.prototypes.dtype), self.prototypes).abs()
        top, index = scores.topk(self.top_k, dim=-1)
        scores = torch.full_like(scores, -torch.inf).scatter(-1, index, top)
        return (scores / self.temperature).softmax(-1)

    def forward(self, base: BranchedBase, x: Tensor) -> Tensor:
        weights = (
            self.expert_weights(x).to(x.dtype).unbind(-1)
        )  # they sum to 1, so W x is not subtracted from each branch
        mixture: Any = sum(w[..., None] * base.branch(name)(x) for w, name in zip(weights, self.experts, strict=True))
        return mixture if base.is_own else base(x) + (mixture - base.own(x))


def factors_of(model: nn.Module, expert: str) -> dict[str, LowRank]:
    """Return the low-rank factors of an expert, by the path of the linear layer.

    Raises:
        PeftcoreError: the model has no such adapter, or the adapter is not a product B A at every module.
    """
    factors_by_path: dict[str, LowRank] = {}
    adapted = other_adapter(model, expert)
    for path, adapter in adapted.modules.items():
        factors = adapter.low_rank() if implements(adapter, Adapter.low_rank) else []
        if len(factors) != 1 or factors[0].transposed or factors[0].a.dim() != 2:
            raise PeftcoreError(
                f"'{expert}' ({adapted.method}) is not a product B A of a linear layer at '{path}'. "
                "Choose other experts"
            )
        factors_by_path[path] = factors[0]
    return factors_by_path


def direction(factors: LowRank, seed: int | None) -> Tensor:
    """Return the top right singular vector `[in]` of B A, fp32, by power iteration."""
    a, b = factors.a.float(), factors.b.float()
    if a.is_meta:
        return a.new_empty(a.shape[1])
    generator = None if seed is None else torch.Generator(a.device).manual_seed(seed)
    v = F.normalize(torch.randn(a.shape[1], generator=generator, device=a.device), dim=0)
    for _ in range(_STEPS):
        v = F.normalize(a.T @ ((b.T @ b) @ (a @ v)), dim=0, eps=1e-30)
    return v


def place(model: nn.Module, config: ArrowConfig, architecture: Architecture) -> list[Placement]:
    experts = {name: factors_of(model, name) for name in config.experts}
    layers = experts[config.experts[0]]
    for name, factors_by_path in experts.items():
        if differing := sorted(factors_by_path.keys() ^ layers.keys()):
            raise PeftcoreError(
                "experts must be at the same modules: only one of "
                f"'{config.experts[0]}' and '{name}' is at {differing[:3]}"
            )
    routers = {path: ArrowRouter(config, factors.a.shape[1]) for path, factors in layers.items()}
    return [Around(path, router, branches=tuple(config.experts)) for path, router in routers.items()]


def initialize(
    model: nn.Module, adapters: Mapping[str, Any], config: ArrowConfig, batches: Iterable[Any] | None
) -> None:
    for index, name in enumerate(config.experts):
        for path, factors in factors_of(model, name).items():
            adapters[path].prototypes[index] = direction(factors, config.rng_seed)


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(peft_type="ARROW")
    return [Method("arrow", ArrowConfig, place, rules, initialize=initialize, learning_rate=1e-3)]
