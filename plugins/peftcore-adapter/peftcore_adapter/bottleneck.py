"""Bottleneck networks f and their positions at a sublayer: after it, after its norm, or parallel to it."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.plugin import Adapter, Base, first_of, validation, with_first
from peftcore_adapter.config import ACTIVATIONS, AdapterConfig
from peftcore_adapter.phm import PHMLinear, Shared


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Return `layer(x)`, with the weights of an `nn.Linear`, often fp32, cast to the dtype of x."""
    if not isinstance(layer, nn.Linear):
        return cast(Tensor, layer(x))
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Return `norm(x)`, with its weights cast to the dtype of x."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


class Bottleneck(Adapter):
    """Network f for x `[..., width]`. Subclasses define what it reads and where its output is added."""

    def __init__(
        self, config: AdapterConfig, path: str, width: int, out_width: int | None = None, shared: Shared | None = None
    ) -> None:
        super().__init__()
        out_width, shared = out_width or width, shared or Shared(config)
        size = config.bottleneck_size or max(1, int(width // config.reduction_factor))
        validation.require(
            size <= width,
            f"bottleneck_size={size} is wider than '{path}' ({width}). Choose at most {width}; an eighth is common",
        )
        self.config, self.width = config, width
        if config.ln_before:
            self.adapter_norm_before = nn.LayerNorm(width)
        self.adapter_down: nn.Module
        self.adapter_up: nn.Module
        if config.phm_layer:
            self.adapter_down = PHMLinear(config, (width, size), shared, up=False)
            self.adapter_up = PHMLinear(config, (size, out_width), shared, up=True)
        else:
            self.adapter_down = down = nn.Linear(width, size)  # Kaiming uniform, as in He et al.
            self.adapter_up = up = nn.Linear(size, out_width)
            for parameter in (down.bias, up.weight, up.bias):
                nn.init.zeros_(parameter)
        if isinstance(config.scaling, str):
            self.scaling = nn.Parameter(torch.ones(out_width if config.scaling == "channel" else 1))
        if config.use_gating:
            self.gate = nn.Linear(width, 1)
            nn.init.normal_(self.gate.weight, std=0.02)
            nn.init.zeros_(self.gate.bias)
        if config.ln_after:
            self.adapter_norm_after = nn.LayerNorm(out_width)
        # A module, since trainers look for modules to turn dropout off.
        self.dropout = nn.Dropout(config.dropout)

    def extra_repr(self) -> str:
        return f"non_linearity={self.config.non_linearity}, scaling={self.config.scaling}"

    def up(self, x: Tensor) -> Tensor:
        """Return scaling · U act(D x), before dropout, gate and norm; AdapterFusion mixes these."""
        config = self.config
        z = layer_norm(self.adapter_norm_before, x) if config.ln_before else x
        z = ACTIVATIONS[config.non_linearity](linear(self.adapter_down, z))  # [..., bottleneck]
        z = linear(self.adapter_up, z)  # [..., out_width]
        if self.training and config.stochastic_depth:
            keep_probability = torch.full((len(z), *[1] * (z.dim() - 1)), 1 - config.stochastic_depth, device=z.device)
            z = z * (torch.bernoulli(keep_probability) / keep_probability).to(z.dtype)
        return z * (self.scaling.to(z.dtype) if isinstance(config.scaling, str) else config.scaling)

    def change(self, x: Tensor, base: Base | None = None) -> Tensor:
        """Return the change to add for input x. `base`, the next link of the chain, is for adapters that need it."""
        z = self.dropout(self.up(x))
        if self.config.use_gating:
            validation.require(
                x.dim() == 3,
                "use_gating averages over the tokens of each row, so it needs an input [rows, tokens, width], found "
                f"{list(x.shape)}. Set use_gating=False",
            )
            z = z * torch.sigmoid(linear(self.gate, x)).mean(1, keepdim=True)
        return layer_norm(self.adapter_norm_after, z) if self.config.ln_after else z


class Series(Bottleneck):
    """Bottleneck after a module: y -> y + f(y)."""

    def forward(self, y: Tensor) -> Tensor:
        return y + self.change(y)


class AfterNorm(Bottleneck):
    """Bottleneck around the norm of z = h + x: norm(z + f(norm(z)))."""

    def forward(self, base: Base, z: Tensor) -> Any:
        return after_norm(self, base, z)


class Parallel(Bottleneck):
    """Bottleneck around a module whose first argument is x: h + f(x)."""

    def __init__(self, config: AdapterConfig, path: str, module: nn.Module, widths: tuple[int, int], shared: Shared):
        super().__init__(config, path, *widths, shared=shared)
        self.argument = next(iter(inspect.signature(module.forward).parameters))

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs[self.argument]
        output = base(*args, **kwargs)
        return with_first(output, first_of(output) + self.change(x))


class ParallelToResidual(Bottleneck):
    """Bottleneck around a module that takes (h, x) and adds them: x becomes x + f(x)."""

    def forward(self, base: Base, h: Tensor, x: Tensor) -> Any:
        return base(h, x + self.change(x))


def after_norm(adapter: Any, base: Base, z: Tensor) -> Any:
    """Return norm(z + f(norm(z))), after adding the changes of other adapters on the same norm, in their order.

    Args:
        adapter: an adapter with `change`, and with `is_after_norm` if it is not a `AfterNorm`.
    """
    stack = [(adapter, base)]
    while isinstance(base.adapter, AfterNorm) or hasattr(base.adapter, "is_after_norm"):
        stack.append((base.adapter, base.inside))
        base = base.inside
    # Each adapter reads the norm of z with the changes of the adapters before it.
    for stacked, inner_base in reversed(stack):
        z = z + stacked.change(base(z), inner_base)
    return base(z)
