"""LoHa (Hyeon-Woo et al. 2021, FedPara, arXiv 2108.06098, prop. 1): W + scale · (B1 A1) ⊙ (B2 A2), scale = alpha / r.

    B1 [out, r]  A1 [r, in]      The elementwise product equals B A of rank r²: columns of B [out, r²] are products of
    B2 [out, r]  A2 [r, in]      columns of B1 and B2, and rows of A [r², in] are products of rows of A1 and A2.

It is computed like a LoRA of rank r² where r² is small, and as a full matrix otherwise. All four factors are trained;
A2 is zero at the start. Fields and files are PEFT's, which follow LyCORIS.

For a convolution the matrix is [out, in · k], with k numbers in a kernel. With `use_effective_conv2d` (prop. 3) each of
the two products is B (T A), where T [r, r, k] mixes the r rows of A [r, in] for each position of the kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peftcore_lora.layers import LowRankLinear
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
    targets,
    validation,
)

peftcore_api = ">=3.0,<4"


@dataclass(frozen=True)
class LoHaConfig(targets.LayersConfig):
    """Config with the field names of Hugging Face PEFT's `LoHaConfig`; the other fields select layers.

    Args:
        r, alpha: rank of each product; the scale is alpha / r.
        rank_pattern, alpha_pattern: values for single layers, by name.
        rank_dropout: dropout probability of the update's outputs.
        module_dropout: probability of dropping a layer's whole update in training.
        use_effective_conv2d: use T in convolutions with a kernel larger than 1.
        init_weights: False: random A2; the adapter then changes the model from the start.
    """

    not_in_peft = frozenset({"fan_in_fan_out"})
    kinds = nn.Conv1d, nn.Conv2d
    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.positive_whole(r=self.r, **self.rank_pattern)
        validation.probability(rank_dropout=self.rank_dropout, module_dropout=self.module_dropout)

    def misfit(self, path: str, module: nn.Module) -> str | None:
        return targets.odd_convolution(path, module)


class LoHa(LowRankLinear):
    """`hada_w1_a` `[out, r]`, `hada_w1_b` `[r, in]` and the second pair of a linear layer."""

    per_sample = staticmethod(Adapter.per_sample)  # one dropout mask serves all samples of a call

    def __init__(self, config: LoHaConfig, path: str, width: int, out_width: int) -> None:
        r = targets.pattern_value(config.rank_pattern, path, config.r)
        super().__init__(targets.pattern_value(config.alpha_pattern, path, config.alpha) / r)
        self.dropouts = config.rank_dropout, config.module_dropout
        self.is_low_rank = r * r * (width + out_width) < width * out_width
        self.hada_w1_a, self.hada_w1_b = uniform(out_width, r), uniform(r, width)
        self.hada_w2_a, self.hada_w2_b = uniform(out_width, r), uniform(r, width)
        if config.init_weights:
            nn.init.zeros_(self.hada_w2_b)

    def products(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return (B1, A1) and (B2, A2)."""
        return (self.hada_w1_a, self.hada_w1_b), (self.hada_w2_a, self.hada_w2_b)

    def pair(self) -> tuple[Tensor, Tensor]:
        (b1, a1), (b2, a2) = self.products()
        return (a1[:, None] * a2[None]).flatten(0, 1), (b1[:, :, None] * b2[:, None]).flatten(1)

    def delta(self) -> Tensor:
        (b1, a1), (b2, a2) = self.products()
        return self.scale * (b1.float() @ a1.float()) * (b2.float() @ a2.float())

    def forward(self, base: Base, x: Tensor) -> Tensor:
        if self.is_low_rank and not (self.training and any(self.dropouts)):
            return super().forward(base, x)
        update = F.linear(x, self.delta().to(x.dtype))
        return base(x) + (dropout(update, *self.dropouts) if self.training else update)


class LoHaConv(LoHa):
    """LoHa of a convolution, with its weight as a matrix `[out, in / groups · k]`."""

    def __init__(self, config: LoHaConfig, path: str, layer: nn.Conv1d | nn.Conv2d) -> None:
        super().__init__(config, path, *targets.sizes(layer))
        self.shape = layer.weight.shape

    def delta(self) -> Tensor:
        return super().delta().view(self.shape)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        update = base.module._conv_forward(x, self.delta().to(x.dtype), None)
        return base(x) + (dropout(update, *self.dropouts, axes=len(self.shape) - 2) if self.training else update)


class LoHaTucker(LoHaConv):
    """LoHa of a convolution with T: `hada_t1` `[r, r, k, k]`, `hada_w1_a` `[r, out]`, `hada_w1_b` `[r, in]`, ..."""

    def __init__(self, config: LoHaConfig, path: str, layer: nn.Conv1d | nn.Conv2d) -> None:
        super().__init__(config, path, layer)
        (r, out_width), width = self.hada_w1_a.T.shape, self.shape[1]
        self.hada_t1, self.hada_w1_a, self.hada_w1_b = core(r, layer), uniform(r, out_width), uniform(r, width)
        self.hada_t2, self.hada_w2_a, self.hada_w2_b = core(r, layer), uniform(r, out_width), uniform(r, width)
        if config.init_weights:
            nn.init.zeros_(self.hada_w2_b)

    def products(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        a1, a2 = mix_rows(self.hada_t1, self.hada_w1_b), mix_rows(self.hada_t2, self.hada_w2_b)
        return (self.hada_w1_a.T, a1), (self.hada_w2_a.T, a2)


def has_core(layer: nn.Module, use_effective_conv2d: bool) -> bool:
    """Return whether a convolution's update has a core T: its kernel is larger than 1, and the config asks for T."""
    return use_effective_conv2d and any(k > 1 for k in cast(Any, layer).kernel_size)


def core(r: int, layer: nn.Conv1d | nn.Conv2d) -> nn.Parameter:
    """Return a new T `[r, r, k, k]`, or `[r, r, k, 1]` for one dimension."""
    return uniform(r, r, *layer.kernel_size, *([1] if isinstance(layer, nn.Conv1d) else []))


def mix_rows(core: Tensor, rows: Tensor) -> Tensor:
    """Return T A, `[r, in · k]`."""
    return torch.einsum("ijkl,jn->inkl", core, rows).flatten(1)


def uniform(*shape: int) -> nn.Parameter:
    """Return a new factor, initialised as in PEFT: `kaiming_uniform_` with a = √5."""
    return nn.Parameter(nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5)))


def dropout(
    update: Tensor, rank_dropout: float, module_dropout: float, rescale: bool = True, *, axes: int = 0
) -> Tensor:
    """Drop outputs of an update, and sometimes all of it, as in training.

    Args:
        update: `[..., out]`, followed by `axes` more dimensions.
        rank_dropout: probability of dropping an output.
        module_dropout: probability of dropping the whole update.
        rescale: scale the remaining outputs up, so that their expected sum is unchanged.
    """
    if rank_dropout:
        mask = (torch.rand(update.shape[-1 - axes], device=update.device) > rank_dropout).to(update.dtype)
        mask = mask / mask.mean().clamp(min=1 / len(mask)) if rescale else mask
        update = update * mask.view(-1, *[1] * axes)
    return update * (torch.rand((), device=update.device) > module_dropout) if module_dropout else update


def place(model: nn.Module, config: LoHaConfig, architecture: Architecture) -> list[Placement]:
    layers = config.selected(model, architecture)
    return [Around(path, adapter_for(config, path, module)) for path, module in layers.items()]


def adapter_for(config: LoHaConfig, path: str, module: nn.Module) -> LoHa:
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return LoHa(config, path, *targets.sizes(module))
    return (LoHaTucker if has_core(module, config.use_effective_conv2d) else LoHaConv)(config, path, module)


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(
        peft_type="LOHA", peft=PeftRules(own_fields=LoHaConfig.not_in_peft, unreadable=targets.conv1d_paths)
    )
    return [Method("loha", LoHaConfig, place, rules, learning_rate=1e-2)]
