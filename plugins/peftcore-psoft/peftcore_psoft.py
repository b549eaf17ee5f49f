"""PSOFT (Wu et al. 2025, arXiv 2505.11235): rotate W's principal subspace, W + scale · B (R - 1) A.

    scale · B A = the r largest singular values of W with their vectors      A [r, in], B [out, r], frozen
    R = diag(b) · rotation · diag(a)                                         scale = psoft_alpha / r

The rotation is the Cayley transform of a skew-symmetric Q, as in OFT; a and b [r] allow small changes of length. The
upper triangle of Q, initially zero, and a and b, initially one, are trained. x is multiplied by A, R - 1 and B in turn.
Files contain A, B and R, since the singular vectors of W depend on its rounding and on the machine's LAPACK. Files of
Hugging Face PEFT contain only R, and A and B are computed from W, as in PEFT.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peftcore_lora.layers import LowRankLinear
from peftcore_oft import cayley, neumann, skew
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.plugin import (
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
    targets,
    validation,
    weight_format,
)

peftcore_api = ">=3.0,<4"


@dataclass(frozen=True)
class PsoftConfig(targets.LayersConfig):
    """Config with the field names of Hugging Face PEFT's `PsoftConfig`; the other fields select layers.

    Args:
        r, psoft_alpha: dimension of the subspace; B is divided by the scale, psoft_alpha / r.
        psoft_dropout: dropout probability of the inputs of A.
        ab_svd_init: "psoft_init": B contains the singular values. "pissa_init": A and B contain their square roots.
        psoft_svd: "full", or "lowrank" (`torch.svd_lowrank`, with psoft_svd_lowrank_niter and random_seed).
        psoft_orth: False: R is any matrix.
        psoft_mag_a, psoft_mag_b: train a, and b.
        use_cayley_neumann, num_cayley_neumann_terms: compute the rotation by a series of so many terms.
        cayley_neumann_eps: upper limit of the norm of Q, between 0 and 1, or None.
        init_weights: False: a random rotation; the adapter then changes the model from the start.
    """

    r: int = 32
    psoft_alpha: float = 32
    psoft_dropout: float = 0.0
    ab_svd_init: Literal["psoft_init", "pissa_init"] = "psoft_init"
    psoft_svd: Literal["full", "lowrank"] = "full"
    psoft_svd_lowrank_niter: int = 10
    random_seed: int = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = 5
    cayley_neumann_eps: float | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.positive_whole(r=self.r, psoft_svd_lowrank_niter=self.psoft_svd_lowrank_niter)
        validation.probability(psoft_dropout=self.psoft_dropout)
        validation.require(self.psoft_alpha > 0, f"psoft_alpha must be positive, found {self.psoft_alpha}")
        terms, eps = self.num_cayley_neumann_terms, self.cayley_neumann_eps
        validation.require(terms > 1, f"num_cayley_neumann_terms={terms} rotates nothing. Use 2 or more")
        validation.require(eps is None or 0 < eps < 1, f"cayley_neumann_eps must be between 0 and 1, found {eps}")

    def misfit(self, path: str, module: nn.Module) -> str | None:
        width, out_width = targets.sizes(module)
        if self.r <= min(width, out_width):
            return None
        return f"r={self.r} is above a size of '{path}', {width} inputs and {out_width} outputs. Choose a smaller r"


class SubspaceRotation(nn.Module):
    """R `[r, r]`: `weight` is Q's upper triangle `[r (r - 1) / 2]`, or R itself; vectors b and a `[r]`."""

    def __init__(self, config: PsoftConfig) -> None:
        super().__init__()
        r, self.config = config.r, config
        self.weight = nn.Parameter(torch.zeros(r * (r - 1) // 2) if config.psoft_orth else torch.eye(r))
        self.vector_b = nn.Parameter(torch.ones(r)) if config.psoft_mag_b else None
        self.vector_a = nn.Parameter(torch.ones(r)) if config.psoft_mag_a else None
        if not config.init_weights:
            self.weight.data += 0.1 * torch.randn(self.weight.shape)

    def forward(self) -> Tensor:
        """Return R - 1, fp32."""
        identity = torch.eye(self.config.r, device=self.weight.device)
        delta = self.rotation_delta() if self.config.psoft_orth else self.weight.float() - identity
        gain = delta.new_ones(self.config.r)
        if self.vector_b is not None:
            delta, gain = self.vector_b.float()[:, None] * delta, gain * self.vector_b.float()
        if self.vector_a is not None:
            delta, gain = delta * self.vector_a.float(), gain * self.vector_a.float()
        return delta + torch.diag(gain - 1)

    def rotation_delta(self) -> Tensor:
        """Return the rotation minus 1, fp32."""
        q, eps = skew(self.weight.float(), self.config.r), self.config.cayley_neumann_eps
        if not self.config.use_cayley_neumann:
            return cayley(-q)
        if eps is not None:
            q = q * (eps / torch.linalg.matrix_norm(q).clamp(min=eps))
        return neumann(q, self.config.num_cayley_neumann_terms)


class Psoft(LowRankLinear):
    """Rotation `psoft_R` of a linear layer, and the frozen A `[r, in]` and B `[out, r]` of its weight."""

    psoft_A: Tensor
    psoft_B: Tensor

    def __init__(self, config: PsoftConfig, weight: Tensor | None, width: int, out_width: int) -> None:
        super().__init__(config.psoft_alpha / config.r, config.psoft_dropout)
        self.psoft_R = SubspaceRotation(config)
        a, b = torch.empty(config.r, width), torch.empty(out_width, config.r)
        if weight is not None:
            a, b = principal_factors(weight, config, self.full_scale)
        self.register_buffer("psoft_A", a)
        self.register_buffer("psoft_B", b)

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.psoft_R() @ self.psoft_A.float(), self.psoft_B

    def forward(self, base: Base, x: Tensor) -> Tensor:
        """Compute A x first: it is all that autograd saves for R's gradient, instead of x."""
        y, u = base(x), F.linear(self.dropout(x), self.psoft_A.to(x.dtype))
        return y + F.linear(F.linear(u, (self.scale * self.psoft_R()).to(x.dtype)), self.psoft_B.to(x.dtype))


@torch.no_grad()
def principal_factors(weight: Tensor, config: PsoftConfig, scale: float) -> tuple[Tensor, Tensor]:
    """Return A and B of a weight `[out, in]`, computed as in PEFT: R depends on the signs of the singular vectors."""
    if config.psoft_svd == "full":
        u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[] if weight.device.type == "cpu" else [weight.device]):
            torch.manual_seed(config.random_seed)
            u, s, v = torch.svd_lowrank(weight.float(), q=config.r, niter=config.psoft_svd_lowrank_niter)
        vh = v.T
    u, s, vh = u[:, : config.r], s[: config.r] / scale, vh[: config.r]
    a_scale, b_scale = (s.sqrt(), s.sqrt()) if config.ab_svd_init == "pissa_init" else (torch.ones_like(s), s)
    return (a_scale[:, None] * vh).contiguous(), (u * b_scale).contiguous()


def place(model: nn.Module, config: PsoftConfig, architecture: Architecture) -> list[Placement]:
    placements: list[Placement] = []
    for path, module in config.selected(model, architecture).items():
        width, out_width = targets.sizes(module)
        layer: Any = module
        has_values = not (layer.weight.is_meta or torch.empty(0).is_meta)
        weight = weight_format(module).read(module) if has_values else None
        placements.append(Around(path, Psoft(config, weight, width, out_width)))
    return placements


def read(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    """Compute A and B, which PEFT's files lack, from the model's weights."""
    if model is None:
        return tensors, fields
    names = {field.name for field in dataclasses.fields(PsoftConfig)}
    config = PsoftConfig(**{name: value for name, value in fields.items() if name in names})
    completed = dict(tensors)
    for name in tensors:
        prefix, is_rotation, _ = name.rpartition(".psoft_R.weight")
        if is_rotation and f"{prefix}.psoft_A" not in tensors:
            weight = targets.dense_weight(model, prefix.removeprefix("base_model.model."))
            a, b = principal_factors(weight, config, config.psoft_alpha / config.r)
            completed |= {f"{prefix}.psoft_A": a, f"{prefix}.psoft_B": b}
    return completed, fields


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(peft_type="PSOFT", read=read, peft=PeftRules(unreadable=targets.conv1d_paths))
    return [Method("psoft", PsoftConfig, place, rules, learning_rate=3e-3)]
