"""LoKr (Yeh et al. 2023, LyCORIS, arXiv 2309.14859, section 3.3): W + scale · W1 ⊗ W2, scale = alpha / r.

    out = l · k, in = m · n          x [m · n] as a matrix X [m, n]:
    W1 [l, m], W2 [k, n]             (W1 ⊗ W2) x = W1 X W2ᵀ, without a matrix [out, in]

m and l are the largest divisors up to the square root, or `decompose_factor`. W2 is a product of rank r where that is
smaller than a full matrix; with `decompose_both` so is W1. All factors are trained. W1, or its first factor, is zero at
the start.

For a convolution W2 is [k, n, kernel]. As a product of rank r it is a matrix [k, n · kernel], or with
`use_effective_conv2d` B (T A) as in LoHa.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peftcore_loha import dropout, has_core, mix_rows, uniform
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
class LoKrConfig(targets.LayersConfig):
    """Config with the field names of Hugging Face PEFT's `LoKrConfig`; the other fields select layers.

    Args:
        r, alpha: rank of W1 and W2 where they are products; the scale is always alpha / r.
        rank_pattern, alpha_pattern: values for single layers, by name.
        rank_dropout: dropout probability of the update's outputs.
        rank_dropout_scale: rescale the remaining outputs.
        module_dropout: probability of dropping a layer's whole update in training.
        decompose_both: make W1 a product as well.
        decompose_factor: size of W1. -1: the largest divisor up to the square root.
        use_effective_conv2d: use T in convolutions with a kernel larger than 1.
        init_weights: "lycoris": W2, or its second factor, is zero instead of W1. False: all factors are random.
    """

    not_in_peft = frozenset({"fan_in_fan_out"})
    kinds = nn.Conv1d, nn.Conv2d
    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | Literal["lycoris"] = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.positive_whole(r=self.r, **self.rank_pattern)
        validation.probability(rank_dropout=self.rank_dropout, module_dropout=self.module_dropout)
        factor = self.decompose_factor
        validation.require(factor == -1 or factor > 0, f"decompose_factor must be -1 or positive, found {factor}")

    def misfit(self, path: str, module: nn.Module) -> str | None:
        return targets.odd_convolution(path, module)


class LoKr(Adapter):
    """`lokr_w1` `[l, m]` and `lokr_w2` `[k, n]`, or as products `lokr_w1_a` `[l, r]`, `lokr_w1_b` `[r, m]`, ..."""

    def __init__(
        self, config: LoKrConfig, path: str, width: int, out_width: int, kernel: Sequence[int] = (), core: bool = False
    ) -> None:
        super().__init__()
        r = targets.pattern_value(config.rank_pattern, path, config.r)
        self.scale = targets.pattern_value(config.alpha_pattern, path, config.alpha) / r
        self.dropouts = config.rank_dropout, config.module_dropout, config.rank_dropout_scale
        m, n = split_size(width, config.decompose_factor)
        o, k = split_size(out_width, config.decompose_factor)
        full_w1 = not config.decompose_both or 2 * r >= max(o, m)
        shapes: dict[str, tuple[int, ...]] = (
            {"lokr_w1": (o, m)} if full_w1 else {"lokr_w1_a": (o, r), "lokr_w1_b": (r, m)}
        )
        if 2 * r >= max(k, n):
            shapes |= {"lokr_w2": (k, n, *kernel)}
        elif core:
            shapes |= {"lokr_t2": (r, r, *kernel, 1)[:4], "lokr_w2_a": (r, k), "lokr_w2_b": (r, n)}
        else:
            shapes |= {"lokr_w2_a": (k, r), "lokr_w2_b": (r, n * math.prod(kernel))}
        for name, shape in shapes.items():
            self.register_parameter(name, uniform(*shape))
        if config.init_weights:
            factors = dict(self.named_parameters())
            full, factor = ("lokr_w2", "lokr_w2_b") if config.init_weights == "lycoris" else ("lokr_w1", "lokr_w1_a")
            nn.init.zeros_(factors[full] if full in factors else factors[factor])

    def factors(self, name: str) -> list[Tensor]:
        """Return W1 or W2, or the two matrices whose product it is."""
        return [
            getattr(self, parameter_name)
            for parameter_name in (name, f"{name}_a", f"{name}_b")
            if hasattr(self, parameter_name)
        ]

    def forward(self, base: Base, x: Tensor) -> Tensor:
        w1_factors = [factor.to(x.dtype) for factor in self.factors("lokr_w1")]
        w2_factors = [factor.to(x.dtype) for factor in self.factors("lokr_w2")]
        u = x.unflatten(-1, (w1_factors[-1].shape[1], w2_factors[-1].shape[1]))  # [..., m, n]
        for factor in reversed(w2_factors):
            u = F.linear(u, factor)  # [..., m, k]
        for factor in reversed(w1_factors):
            # Not `factor @ u`, which PyTorch computes in a different order if the factor needs gradients.
            u = F.linear(u.mT.contiguous(), factor).mT  # [..., l, k]
        update = self.scale * u.flatten(-2)
        return base(x) + (dropout(update, *self.dropouts) if self.training else update)

    def delta(self) -> Tensor:
        """Return scale · W1 ⊗ W2, fp32 `[out, in]`."""

        def product(name: str) -> Tensor:
            factors = [factor.float() for factor in self.factors(name)]
            return factors[0] @ factors[1] if len(factors) == 2 else factors[0]

        w1, w2 = product("lokr_w1"), product("lokr_w2")
        if w2.dim() == 4:
            w1 = w1[:, :, None, None]
        return self.scale * torch.kron(w1.contiguous(), w2.contiguous())

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.delta().view_as(weight), bias


class LoKrConv(LoKr):
    """`lokr_w2` `[k, n, kernel]`, or `[k, r]` and `[r, n · kernel]`, or with `lokr_t2` `[r, k]` and `[r, n]`.

    For a full `lokr_w2` of an nn.Conv1d, the product is [1, l, m] ⊗ [k, n, kernel], reshaped to the weight, as in PEFT.
    """

    def __init__(self, config: LoKrConfig, path: str, layer: nn.Conv1d | nn.Conv2d) -> None:
        core = has_core(layer, config.use_effective_conv2d)
        super().__init__(config, path, layer.weight.shape[1], layer.out_channels, layer.kernel_size, core)
        self.shape = layer.weight.shape

    def factors(self, name: str) -> list[Tensor]:
        factors = super().factors(name)
        if name == "lokr_w2" and hasattr(self, "lokr_t2"):
            core: Any = self.lokr_t2
            return [factors[0].T, mix_rows(core, factors[1])]
        return factors

    def forward(self, base: Base, x: Tensor) -> Tensor:
        update = base.module._conv_forward(x, self.delta().view(self.shape).to(x.dtype), None)
        return base(x) + (dropout(update, *self.dropouts, axes=len(self.shape) - 2) if self.training else update)


def split_size(size: int, factor: int) -> tuple[int, int]:
    """Return (p, q) with p · q = size, where p is `factor` if it divides size.

    Otherwise p is the largest divisor that exceeds neither `factor` (unless it is -1) nor the square root of size.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    p = next(p for p in range(limit, 0, -1) if size % p == 0)
    return p, size // p


def place(model: nn.Module, config: LoKrConfig, architecture: Architecture) -> list[Placement]:
    layers = config.selected(model, architecture)
    return [Around(path, adapter_for(config, path, module)) for path, module in layers.items()]


def adapter_for(config: LoKrConfig, path: str, module: nn.Module) -> LoKr:
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return LoKrConv(config, path, module)
    return LoKr(config, path, *targets.sizes(module))


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(
        peft_type="LOKR", peft=PeftRules(own_fields=LoKrConfig.not_in_peft, unreadable=targets.conv1d_paths)
    )
    return [Method("lokr", LoKrConfig, place, rules, learning_rate=1e-2)]
