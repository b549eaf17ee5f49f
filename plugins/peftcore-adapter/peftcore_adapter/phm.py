"""Compacter (Karimi Mahabadi et al. 2021, arXiv 2106.04647): matrices as sums of Kronecker products.

    H = A_1 ⊗ W_1 + ... + A_n ⊗ W_n       y = x H + b,    A_i [n, n],  W_i [in / n, out / n]
    W_i = L_i R_i                         with factorized_phm_W, L_i [in / n, rank], R_i [rank, out / n]
    A_i = s_i t_i                         with factorized_phm_rule, s_i [n, 1], t_i [1, n]

With shared_phm_rule all layers share the A_i. With shared_W_phm all D share one set of W_i, and all U another.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.plugin import validation
from peftcore_adapter.config import AdapterConfig


class Factors(nn.Module):
    """n matrices `[n, rows, columns]`, stored in full or as low-rank products."""

    def __init__(self, shape: tuple[int, int, int], rank: int | None) -> None:
        super().__init__()
        n, rows, columns = shape
        if rank is None:
            self.whole = nn.Parameter(torch.empty(shape))
        else:
            self.left = nn.Parameter(torch.empty(n, rows, rank))
            self.right = nn.Parameter(torch.empty(n, rank, columns))

    def matrices(self, like: Tensor) -> Tensor:
        """Return the matrices `[n, rows, columns]` on the device and in the dtype of `like`."""
        parameters = [self.whole] if hasattr(self, "whole") else [self.left, self.right]
        factors = [part.to(like.device, like.dtype) for part in parameters]
        return factors[0] if len(factors) == 1 else torch.bmm(*factors)


def rule(config: AdapterConfig) -> Factors:
    """Return new A_i; they are buffers if learn_phm is False."""
    n = config.phm_dim
    factors = Factors((n, n, n), 1 if config.factorized_phm_rule else None)
    for name, parameter in list(factors.named_parameters()):
        nn.init.normal_(parameter, std=config.phm_init_range)
        if not config.learn_phm:
            delattr(factors, name)
            factors.register_buffer(name, parameter.detach())
    return factors


def weights(config: AdapterConfig, width: int, out_width: int, zero: bool) -> Factors:
    """Return new W_i, Glorot uniform, or zero at the start; of a product only the last factor is zero."""
    n = config.phm_dim
    for size in (width, out_width):
        validation.require(
            size % n == 0,
            f"phm_dim={n} does not divide the width {size} of a projection {width} -> {out_width}. Choose a phm_dim "
            "that divides both, or a bottleneck_size that it divides",
        )
    factors = Factors((n, width // n, out_width // n), config.phm_rank if config.factorized_phm_W else None)
    for name, parameter in factors.named_parameters():
        for matrix in parameter:
            nn.init.zeros_(matrix) if zero and name != "left" else nn.init.xavier_uniform_(matrix)
    return factors


class Shared:
    """Factors that the layers of one adapter share, created on first use."""

    def __init__(self, config: AdapterConfig) -> None:
        self.config = config
        self.factors: dict[str, Factors] = {}

    def rule(self) -> Factors:
        """Return the A_i for a layer."""
        if not self.config.shared_phm_rule:
            return rule(self.config)
        if "rule" not in self.factors:
            self.factors["rule"] = rule(self.config)
        return self.factors["rule"]

    def weights(self, width: int, out_width: int, up: bool) -> Factors:
        """Return the W_i for a layer's U or D."""
        factors = weights(self.config, width, out_width, zero=up)
        if not self.config.shared_W_phm:
            return factors
        shared_factors = self.factors.setdefault("up" if up else "down", factors)
        validation.require(
            [p.shape for p in shared_factors.parameters()] == [p.shape for p in factors.parameters()],
            "shared_W_phm needs layers of the same width, but the widths differ. Set shared_W_phm=False, or select "
            "layers with target_modules",
        )
        return shared_factors


class PHMLinear(nn.Module):
    """Linear layer from x `[..., in]` to x H + b `[..., out]`."""

    def __init__(self, config: AdapterConfig, sizes: tuple[int, int], shared: Shared, up: bool) -> None:
        super().__init__()
        self.rule, self.factors = shared.rule(), shared.weights(*sizes, up=up)
        self.bias = nn.Parameter(torch.zeros(sizes[1])) if config.phm_bias else None

    def forward(self, x: Tensor) -> Tensor:
        a, w = self.rule.matrices(x), self.factors.matrices(x)
        h = torch.einsum("nab,nij->bjai", a, w).flatten(2).flatten(0, 1)  # [out, in]
        return F.linear(x, h, None if self.bias is None else self.bias.to(x.dtype))
