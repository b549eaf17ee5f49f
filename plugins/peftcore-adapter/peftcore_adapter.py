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
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import peftcore_adapter_hub
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftcore
from peftcore import targets
from peftcore.errors import nearest

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "leakyrelu": F.leaky_relu,
    "elu": F.elu,
    "mish": F.mish,
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
        size = self.bottleneck_size
        for wrong, message in (
            (self.placement not in SUBLAYERS, f"placement is one of {', '.join(SUBLAYERS)}; found {self.placement!r}"),
            (
                self.non_linearity not in ACTIVATIONS,
                f"non_linearity '{self.non_linearity}' is unknown{nearest(self.non_linearity, ACTIVATIONS)}. "
                f"It is one of {', '.join(ACTIVATIONS)}",
            ),
            (
                size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1),
                f"bottleneck_size must be a positive whole number, found {size!r}",
            ),
            (
                not self.reduction_factor >= 1,
                f"reduction_factor must be at least 1, found {self.reduction_factor!r}: a bottleneck wider than the "
                "layer is none",
            ),
            (not math.isfinite(self.scaling), f"scaling must be finite, found {self.scaling!r}"),
            (not 0 <= self.dropout < 1, f"dropout must be in [0, 1), found {self.dropout!r}"),
            (
                self.is_parallel and self.original_ln_before,
                "is_parallel and original_ln_before exclude each other: a parallel adapter stands behind nothing",
            ),
            (
                self.target_modules is not None and (self.original_ln_before or self.cross_adapter),
                "original_ln_before and cross_adapter choose among known sublayers; target_modules names modules",
            ),
            (
                self.target_modules is None and bool(self.exclude_modules or self.layers_pattern),
                "exclude_modules and layers_pattern go with target_modules; layers_to_transform goes without",
            ),
        ):
            if wrong:
                raise peftcore.PeftcoreError(message)


class Bottleneck(nn.Module):
    """f. Subclasses say what it reads and where its output goes; x `[..., width]`."""

    def __init__(self, config: AdapterConfig, path: str, width: int, out_width: int | None = None) -> None:
        super().__init__()
        size = config.bottleneck_size or max(1, int(width // config.reduction_factor))
        if size > width:
            raise peftcore.PeftcoreError(
                f"bottleneck_size={size} is wider than '{path}' ({width}). Choose at most {width}, usually an 8th of it"
            )
        self.config = config
        self.adapter_down = nn.Linear(width, size)  # Kaiming-uniform, as in He et al.
        self.adapter_up = nn.Linear(size, out_width or width)
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
        return torch.add(y, F.dropout(z, self.config.dropout, self.training), alpha=self.config.scaling)


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
        if isinstance(output, tuple):
            return (self.add(output[0], x), *output[1:])
        return self.add(output, x)


class BesideResidual(Bottleneck):
    """Around a module that takes (h, x) and adds them: it gets x + scaling · f(x) for x."""

    def forward(self, base: Any, h: Tensor, x: Tensor) -> Any:
        return base(h, self.add(x, x))


def widths(model: nn.Module, path: str, architecture: peftcore.Architecture) -> tuple[int, int]:
    """(width of the input, width of the output) of a module."""
    module = model.get_submodule(path)
    if targets.is_conv1d(module):
        return module.nx, module.nf
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if architecture.hidden_size is None:
        raise peftcore.PeftcoreError(
            f"the width of '{path}' ({type(module).__name__}) is not known, since {type(model).__name__} names no "
            "hidden_size. Name linear layers in target_modules"
        )
    return architecture.hidden_size, architecture.hidden_size


def of_sublayer(model: nn.Module, sublayer: Any, config: AdapterConfig, architecture: peftcore.Architecture) -> Any:
    """The placement at one known sublayer."""
    width = widths(model, sublayer.output, architecture)[1]
    if config.is_parallel and sublayer.adds_residual:
        return peftcore.Around(sublayer.whole, BesideResidual(config, sublayer.whole, width))
    if config.is_parallel:
        adapter = Parallel(config, sublayer.whole, model.get_submodule(sublayer.whole), width, width)
        return peftcore.Around(sublayer.whole, adapter)
    if not config.original_ln_before:
        return peftcore.After(sublayer.output, Series(config, sublayer.output, width))
    if sublayer.norm is not None:
        return peftcore.Around(sublayer.norm, BehindNorm(config, sublayer.norm, width))
    if sublayer.stream is not None:
        return peftcore.After(sublayer.stream, Series(config, sublayer.stream, width))
    raise peftcore.PeftcoreError(
        f"original_ln_before: no module of {type(model).__name__} gives what comes behind the residual of "
        f"'{sublayer.output}'. Use placement='pfeiffer', or original_ln_before=False"
    )


def chosen_sublayers(model: nn.Module, config: AdapterConfig, architecture: peftcore.Architecture) -> list[Any]:
    """The known sublayers that the config means."""
    kinds = SUBLAYERS[config.placement] | ({"cross_attention"} if config.cross_adapter else set())
    found = [sublayer for sublayer in architecture.sublayers if sublayer.kind in kinds]
    if not found:
        linear = [path for path, module in model.named_modules() if targets.is_linear(module)][:3]
        raise peftcore.PeftcoreError(
            f"where {type(model).__name__} has its attention and feed-forward is not known. Name modules whose output "
            f"a bottleneck shall follow: target_modules=[...]; linear layers here: {', '.join(linear) or 'none'}"
        )
    if config.layers_to_transform is None:
        return found
    layers = config.layers_to_transform
    wanted = {layers} if isinstance(layers, int) else set(layers)
    there = {sublayer.layer for sublayer in found}
    if not wanted or wanted - there:
        wrong = f"there is no layer {sorted(wanted - there)}" if wanted else "it names no layer"
        raise peftcore.PeftcoreError(f"layers_to_transform: {wrong} (layers: {sorted(there)})")
    return [sublayer for sublayer in found if sublayer.layer in wanted]


def place(model: nn.Module, config: AdapterConfig, architecture: peftcore.Architecture) -> list[Any]:
    placements: list[Any] = []
    if config.target_modules is None:
        for sublayer in chosen_sublayers(model, config, architecture):
            placements.append(of_sublayer(model, sublayer, config, architecture))
    else:
        for path, module in targets.select(
            model,
            architecture,
            target_modules=config.target_modules,
            exclude_modules=config.exclude_modules,
            layers_to_transform=config.layers_to_transform,
            layers_pattern=config.layers_pattern,
            modules_to_save=config.modules_to_save,
            supported=lambda module: not isinstance(module, nn.ModuleList),
        ).items():
            width, out_width = widths(model, path, architecture)
            if config.is_parallel:
                placements.append(peftcore.Around(path, Parallel(config, path, module, width, out_width)))
            else:
                placements.append(peftcore.After(path, Series(config, path, out_width)))
    return placements


@peftcore.hookimpl
def peftcore_methods() -> list[peftcore.Method]:
    rules = peftcore.StateRules(peft_type="BOTTLENECK_ADAPTER", foreign=(peftcore_adapter_hub.FORMAT,))
    return [peftcore.Method("adapter", AdapterConfig, place, rules, learning_rate=3e-4)]
