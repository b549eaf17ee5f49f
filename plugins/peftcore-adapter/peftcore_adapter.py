"""Bottleneck adapters: f(x) = U · act(D x + d) + u, with D, U thin, beside or behind a frozen sublayer F.

    series (Houlsby et al. 2019)      series, behind the norm           parallel (He et al. 2021)
                                      (Pfeiffer et al. 2020)
        x                                 x                                 x
        |                                 |                                 |
        F                                 F                                 |------.
        | h                               | h                               F      f
        |------.                          |---- + x, norm --- f             | h    | · scaling
        |      f                          |                   |            (+)-----'
       (+)-----' · scaling               (+)------------------' · scaling   |
        |                                 |                                 |
     + x, norm                         + x, norm                         + x, norm

arXiv 1902.00751, 2005.00247, 2110.04366. U and u are zero at the start, so the model is unchanged.
Trained: 2 · d · bottleneck + d + bottleneck numbers each. No `merged`: act stands between D and U.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import peftcore_adapter_hub
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftcore
from peftcore import targets, validation
from peftcore.adaptation.outputs import first_of, with_first

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: getattr(F, name) for name in ("relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu", "elu", "mish")},
    **{"swish": F.silu, "leakyrelu": F.leaky_relu, "gelu_new": partial(F.gelu, approximate="tanh")},  # AdapterHub's
    "linear": lambda x: x,
}
SUBLAYERS = {
    "houlsby": {"attention", "feed_forward"},
    "pfeiffer": {"feed_forward"},
    "attention": {"attention"},
}


@dataclass(frozen=True)
class AdapterConfig:
    """Where AdapterHub's library `adapters` has a field, it is its name here.

    Args:
        placement: the sublayers that get a bottleneck: "houlsby" (attention and feed-forward), "pfeiffer"
            (feed-forward) or "attention". cross_adapter: cross-attention too, where there is one.
        is_parallel: f reads what the sublayer reads, in place of what it gives. In a pre-norm model that is
            what comes out of the norm.
        original_ln_before: f reads what comes behind the residual and norm (Pfeiffer), not before.
        reduction_factor: the bottleneck is d // reduction_factor wide, d the width of the sublayer.
        bottleneck_size: or this wide.
        non_linearity: act, one of `ACTIVATIONS`. scaling: factor of f. dropout: probability with which an
            output of f is dropped in training.
        layers_to_transform: indices of the layers that get bottlenecks; None: all.
        target_modules: modules that get one behind (or beside) them, in place of the known sublayers;
            exclude_modules, layers_pattern: see `peftcore.targets.select`.
        modules_to_save: modules trained whole. None: a classifier's head, which pre-training did not train.
    """

    placement: Literal["houlsby", "pfeiffer", "attention"] = "houlsby"
    cross_adapter: bool = False
    is_parallel: bool = False
    original_ln_before: bool = False
    reduction_factor: float = 16
    bottleneck_size: int | None = None
    non_linearity: str = "relu"
    scaling: float = 1.0
    dropout: float = 0.0
    layers_to_transform: int | Sequence[int] | None = None
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    layers_pattern: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        validation.check_types(self)
        validation.one_of(ACTIVATIONS, non_linearity=self.non_linearity)
        validation.probability(dropout=self.dropout)
        if self.bottleneck_size is not None:
            validation.positive_whole(bottleneck_size=self.bottleneck_size)
        require, named = validation.require, self.target_modules is not None
        require(self.reduction_factor >= 1, f"reduction_factor must be at least 1, found {self.reduction_factor!r}")
        require(
            not (self.is_parallel and self.original_ln_before),
            "is_parallel and original_ln_before exclude each other: a parallel adapter stands behind nothing",
        )
        require(
            not (named and (self.original_ln_before or self.cross_adapter)),
            "original_ln_before and cross_adapter choose among known sublayers; target_modules names modules",
        )
        require(
            named or not (self.exclude_modules or self.layers_pattern),
            "exclude_modules and layers_pattern go with target_modules; layers_to_transform goes without",
        )


class Bottleneck(nn.Module):
    """f. Subclasses say what it reads and where its output goes; x `[..., width]`."""

    def __init__(self, config: AdapterConfig, path: str, width: int, out_width: int | None = None) -> None:
        super().__init__()
        size = config.bottleneck_size or max(1, int(width // config.reduction_factor))
        validation.require(
            size <= width,
            f"bottleneck_size={size} is wider than '{path}' ({width}). Choose at most {width}, usually an 8th of it",
        )
        self.config = config
        self.adapter_down = nn.Linear(width, size)  # Kaiming-uniform, as in He et al.
        self.adapter_up = nn.Linear(size, out_width or width)
        self.dropout = nn.Dropout(config.dropout)  # a module: trainers find those, to switch dropout off
        nn.init.zeros_(self.adapter_down.bias)
        nn.init.zeros_(self.adapter_up.weight)
        nn.init.zeros_(self.adapter_up.bias)

    def extra_repr(self) -> str:
        return f"non_linearity={self.config.non_linearity}, scaling={self.config.scaling:g}"

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """y + scaling · f(x). The weights, often fp32, are rounded to the dtype of x."""
        down, up = self.adapter_down, self.adapter_up
        z = F.linear(x, down.weight.to(x.dtype), down.bias.to(x.dtype))  # [..., bottleneck]
        z = ACTIVATIONS[self.config.non_linearity](z)
        z = F.linear(z, up.weight.to(z.dtype), up.bias.to(z.dtype))  # [..., width]
        return torch.add(y, self.dropout(z), alpha=self.config.scaling)


class Series(Bottleneck):
    """Behind a module: y -> y + scaling · f(y)."""

    def forward(self, y: Tensor) -> Tensor:
        return self.add(y, y)


class BehindNorm(Bottleneck):
    """Around the norm of z = h + x: norm(z + scaling · f(norm(z)))."""

    def forward(self, base: Any, z: Tensor) -> Tensor:
        return base(self.add(z, base(z)))


class Parallel(Bottleneck):
    """Around a module whose first argument is x: h + scaling · f(x)."""

    def __init__(self, config: AdapterConfig, path: str, module: nn.Module, width: int, out_width: int) -> None:
        super().__init__(config, path, width, out_width)
        self.argument = next(iter(inspect.signature(module.forward).parameters))

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs[self.argument]
        output = base(*args, **kwargs)
        return with_first(output, self.add(first_of(output), x))


class BesideResidual(Bottleneck):
    """Around a module that takes (h, x) and adds them: it gets x + scaling · f(x) for x."""

    def forward(self, base: Any, h: Tensor, x: Tensor) -> Any:
        return base(h, self.add(x, x))


def at_module(
    model: nn.Module, path: str, config: AdapterConfig, architecture: peftcore.Architecture, width: int | None = None
) -> Any:
    """The placement beside or behind a module; `width` is that of its input and output, where it is known."""
    widths = (width, width) if width is not None else targets.widths(model, path, architecture)
    if config.is_parallel:
        return peftcore.Around(path, Parallel(config, path, model.get_submodule(path), *widths))
    return peftcore.After(path, Series(config, path, widths[1]))


def of_sublayer(model: nn.Module, sublayer: Any, config: AdapterConfig, architecture: peftcore.Architecture) -> Any:
    """The placement at one sublayer."""
    width = sublayer.width
    validation.require(
        not config.is_parallel or sublayer.whole is not None,
        f"is_parallel: no one module of {type(model).__name__} goes from what '{sublayer.output}' and the layers "
        "before it read to what they give. Use is_parallel=False, or name a module: target_modules=[...]",
    )
    if config.is_parallel and sublayer.adds_residual:
        return peftcore.Around(sublayer.whole, BesideResidual(config, sublayer.whole, width))
    if not config.original_ln_before:
        path = sublayer.whole if config.is_parallel else sublayer.output
        return at_module(model, path, config, architecture, width)
    if sublayer.norm is not None:
        return peftcore.Around(sublayer.norm, BehindNorm(config, sublayer.norm, width))
    validation.require(
        sublayer.stream is not None,
        f"original_ln_before: no module of {type(model).__name__} gives what comes behind the residual of "
        f"'{sublayer.output}'. Use placement='pfeiffer', or original_ln_before=False",
    )
    return peftcore.After(sublayer.stream, Series(config, sublayer.stream, width))


def place(model: nn.Module, config: AdapterConfig, architecture: peftcore.Architecture) -> list[Any]:
    if config.target_modules is None:
        kinds = SUBLAYERS[config.placement] | ({"cross_attention"} if config.cross_adapter else set())
        found = targets.sublayers(model, architecture, kinds, config.layers_to_transform)
        return [of_sublayer(model, sublayer, config, architecture) for sublayer in found]
    chosen = targets.select_by(
        config, model, architecture, supported=lambda module: not isinstance(module, nn.ModuleList)
    )
    return [at_module(model, path, config, architecture) for path in chosen]


@peftcore.hookimpl
def peftcore_methods() -> list[peftcore.Method]:
    foreign = peftcore_adapter_hub.foreign_format(AdapterConfig, of_sublayer)
    rules = peftcore.StateRules(peft_type="BOTTLENECK_ADAPTER", foreign=(foreign,))
    return [peftcore.Method("adapter", AdapterConfig, place, rules, learning_rate=3e-3)]
