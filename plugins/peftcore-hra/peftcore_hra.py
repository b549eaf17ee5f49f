"""HRA (Yuan et al. 2024, arXiv 2405.17484): y = W (R x) + bias, where R = H1 H2 ... Hr is a product of reflections.

    Hᵢ = 1 - 2 uᵢ uᵢᵀ / uᵢᵀ uᵢ                  all at once, with the unit vectors uᵢ as columns of U [in, r]:
    R = 1 - U T Uᵀ                            T⁻¹ = 1/2 + the strict upper triangle of UᵀU (compact WY form)

x is multiplied by two narrow matrices before W. U is trained. At the start its columns are equal in pairs, whose
reflections cancel out. With `apply_GS`, Gram-Schmidt makes the reflections orthogonal: R = 1 - 2 Q Qᵀ with a basis Q.
For a convolution W is the matrix [out, in · k], with k numbers in a kernel.
"""

from __future__ import annotations

import math
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
    PeftRules,
    Placement,
    StateRules,
    hookimpl,
    override,
    targets,
    validation,
    warn,
)

peftcore_api = ">=3.0,<4"


@dataclass(frozen=True)
class HRAConfig(targets.LayersConfig):
    """Config with the field names of Hugging Face PEFT's `HRAConfig`; the other fields select layers.

    Args:
        r: number of reflections. With an odd number they do not cancel out, and the adapter changes the model from the
            start.
        apply_GS: make the reflections orthogonal. Their product is then never 1, so the adapter changes the model from
            the start: here by random reflections, in PEFT by the rounding errors of equal vectors.
        bias: biases to train as well: "none", "all", or "hra_only" (of adapted modules).
        init_weights: False: all reflections are random.
    """

    not_in_peft = frozenset({"fan_in_fan_out"})
    kinds = (nn.Conv2d,)
    r: int = 8
    apply_GS: bool = False
    bias: Literal["none", "all", "hra_only"] = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.positive_whole(r=self.r)

    def misfit(self, path: str, module: nn.Module) -> str | None:
        return targets.odd_convolution(path, module, alike=True, grouped=False)


class HRA(Adapter):
    """Reflections `hra_u` `[in, r]` of a linear layer."""

    def __init__(self, config: HRAConfig, width: int) -> None:
        super().__init__()
        self.orthogonal = config.apply_GS
        in_pairs = config.init_weights and config.r % 2 == 0 and not config.apply_GS
        u = nn.init.kaiming_uniform_(torch.empty(width, config.r // 2 if in_pairs else config.r), a=math.sqrt(5))
        self.hra_u = nn.Parameter(u.repeat_interleave(2, dim=1) if in_pairs else u)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return U and U T, fp32 `[in, r]` each, for R = 1 - U T Uᵀ."""
        u = self.hra_u.float()
        if self.orthogonal:
            basis = torch.linalg.qr(u).Q
            return basis, 2 * basis
        u = u / torch.linalg.vector_norm(u, dim=0)
        inverse = (u.T @ u).triu(1) + 0.5 * torch.eye(u.shape[1], device=u.device)
        return u, torch.linalg.solve_triangular(inverse, u, upper=True, left=False)

    def forward(self, base: Base, x: Tensor) -> Any:
        u, ut = (factor.to(x.dtype) for factor in self.pair())
        return base(x - F.linear(x @ u, ut))

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.change(weight), bias

    def change(self, weight: Tensor) -> Tensor:
        """Return W (R - 1), fp32."""
        u, ut = self.pair()
        return -((weight.flatten(1) @ ut) @ u.T).view_as(weight)


class HRAConv(HRA):
    """Reflections `hra_u` `[in · k, r]` of a convolution."""

    def forward(self, base: Base, x: Tensor) -> Any:
        change = self.change(base.weight().float())
        return base(x) + base.module._conv_forward(x, change.to(x.dtype), None)


def place(model: nn.Module, config: HRAConfig, architecture: Architecture) -> list[Placement]:
    layers = config.selected(model, architecture)
    widths = {path: targets.sizes(module)[0] for path, module in layers.items()}
    if config.r > min(widths.values()):
        # Only an orthogonal basis is limited to as many vectors as there are inputs.
        path = min(widths, key=lambda path: widths[path])
        validation.require(
            not config.apply_GS,
            f"r={config.r} is above the {widths[path]} inputs of '{path}', so apply_GS=True has no orthogonal basis. "
            "Choose a smaller r",
        )
    if config.init_weights and (config.r % 2 or config.apply_GS):
        reason = "apply_GS=True" if config.apply_GS else f"r={config.r} is odd"
        warn(
            f"{reason}: the reflections do not cancel at initialization, so the untrained adapter already changes "
            "the model"
        )
    classes = {path: HRAConv if isinstance(module, nn.Conv2d) else HRA for path, module in layers.items()}
    placements: list[Placement] = [Around(path, classes[path](config, width)) for path, width in widths.items()]
    return placements + targets.trained_biases(model, config.bias, layers)


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(
        peft_type="HRA", peft=PeftRules(own_fields=HRAConfig.not_in_peft, unreadable=targets.conv1d_paths)
    )
    return [Method("hra", HRAConfig, place, rules, learning_rate=3e-3)]
