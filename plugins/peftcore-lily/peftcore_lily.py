"""Lily (Zhong et al. 2024, arXiv 2407.09946): y = W x + b + s · (sum over e of p_e B_e) A x, shared factors.

    x --- A --- h --- B_1 .. B_n ---(+)        A [r, in]: one per `stride_A` neighbouring layers
                |     p_1 .. p_n                B_e [out, r]: n of them for all layers of the same name and size
                '--- R --- softmax, mean        R [n, r]: the router, one per layer

p is the mean over all tokens of the call, so the result for a token depends on the others: on other rows of the batch
and texts packed into its row alike, on padding, and on whether earlier tokens are in a cache. The first call with
padding, and the first with a filled cache, warn about it. Lily is not a change of a weight, so it cannot be merged.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore import ops
from peftcore.plugin import (
    Adapter,
    Architecture,
    Around,
    Base,
    Fields,
    Method,
    PeftRules,
    Placement,
    StateRules,
    Tensors,
    arguments_by_name,
    cache_argument,
    cached_tokens,
    decoder_path,
    forward_arguments,
    hookimpl,
    targets,
    validation,
)

peftcore_api = ">=3.0,<4"


@dataclass(frozen=True)
class LilyConfig(targets.LayersConfig):
    """Config with the field names of Hugging Face PEFT's `LilyConfig`; the other fields are LoRA's.

    Args:
        stride_A: number of consecutive layers of the same name and size that share an A. num_B: n, 2 or more.
        init_weights: False: B is random too; the adapter then changes the model from the start.
    """

    r: int = 32
    stride_A: int = 1
    num_B: int = 2
    scaling: float = 1.0
    init_weights: bool = True

    not_in_peft = frozenset({"fan_in_fan_out"})

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.positive_whole(r=self.r, stride_A=self.stride_A)
        validation.require(self.num_B >= 2, f"num_B must be 2 or more, so that the router learns, found {self.num_B}")


def weight(rows: int, columns: int, drawn: bool = True) -> nn.Linear:
    """Return a matrix as a module, so that layers can share it."""
    layer = nn.Linear(columns, rows, bias=False)
    if not drawn:
        nn.init.zeros_(layer.weight)
    return layer


class Lily(Adapter):
    """A `[r, in]`, B `[n · r, out]` and the router `[n, r]`; x `[..., in]` -> y `[..., out]`."""

    whole_batch = True

    def __init__(self, config: LilyConfig, a: nn.Linear, b: nn.Linear) -> None:
        super().__init__()
        self.scale, self.lily_A, self.lily_B = config.scaling, a, b
        self.lily_router = weight(config.num_B, config.r)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        a, b, router = (m.weight.to(x.device, x.dtype) for m in (self.lily_A, self.lily_B, self.lily_router))
        h = F.linear(x, a)
        p = F.linear(h, router).softmax(-1).flatten(0, -2).mean(0)  # [n]
        mixed = torch.einsum("e,ero->ro", p, b.unflatten(0, (len(p), -1)))
        operands = base.linear_operands(x)
        if operands is not None:
            weight, bias = operands
            return ops.lora_linear(x, weight, bias, a, mixed.T, self.scale)
        return base(x) + h @ (self.scale * mixed)


class Notice(Adapter):
    """Observer of the backbone's calls that warns, once each, about padding and caches, which affect the mean."""

    whole_batch = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._names, self._cache_argument = forward_arguments(module), cache_argument(module)
        self._left = {"padding", "cache"}  # warnings to be given

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        if self._left and not torch.compiler.is_compiling():
            self.look(arguments_by_name(self._names, args, kwargs))
        return base(*args, **kwargs)

    def look(self, call: dict[str, Any]) -> None:
        mean = "Lily mixes its factors by a mean over all tokens of a call"
        mask, cache = call.get("attention_mask"), call.get(self._cache_argument or "")
        if "padding" in self._left and isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.all()):
            self._left.remove("padding")
            warnings.warn(
                f"{mean}, padding included, so padding changes the result. Use rows of one length",
                stacklevel=2,
            )
        if "cache" in self._left and cache is not None and cached_tokens(cache) != 0:
            self._left.remove("cache")
            how = "Use generate(use_cache=False) to compute each step like a forward over the whole text"
            warnings.warn(f"{mean}, without the tokens in the cache. {how}", stacklevel=2)


def sharing(layers: Mapping[str, tuple[int, int]], named: str | Sequence[str]) -> list[list[str]]:
    """Return groups of paths whose layers share B: equal sizes, and selected by the same entry of target_modules."""
    groups: dict[Any, list[str]] = {}
    for path, sizes in layers.items():
        entry = None if isinstance(named, str) else max((n for n in named if path.endswith(n)), key=len, default=None)
        groups.setdefault((entry, sizes), []).append(path)
    return list(groups.values())


def place(model: nn.Module, config: LilyConfig, architecture: Architecture) -> list[Placement]:
    layers = {path: targets.sizes(module) for path, module in config.selected(model, architecture).items()}
    placements = {}
    for group in sharing(layers, config.target_modules):
        width, out_width = layers[group[0]]
        b = weight(config.num_B * config.r, out_width, drawn=not config.init_weights)
        for index, path in enumerate(group):
            if index % config.stride_A == 0:
                a = weight(config.r, width)
            placements[path] = Around(path, Lily(config, a, b))
    called = decoder_path(model, architecture) if not architecture.is_encoder_decoder else architecture.backbone
    notice = Around(called, Notice(model.get_submodule(called)))
    return [notice, *(placements[path] for path in layers)]


def read(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    """Keep a shared matrix only with its first layer; PEFT writes it with each."""
    if model is None:
        return tensors, fields
    start, end = "base_model.model.", ".lily_router.weight"
    paths = {name[len(start) : -len(end)] for name in tensors if name.startswith(start) and name.endswith(end)}
    there = {path: targets.sizes(m) for path, m in targets.base_modules(model) if path in paths}
    found = dict(tensors)
    for group in sharing(there, fields["target_modules"]):
        for index, path in enumerate(group):
            first = {"lily_B": group[0], "lily_A": group[index - index % fields["stride_A"]]}
            for name, owner in first.items():
                own = found.get(f"{start}{path}.{name}.weight")
                if owner != path and own is not None:
                    same = torch.equal(own, tensors[f"{start}{owner}.{name}.weight"])
                    validation.require(
                        same, f"{name} of '{path}' must be equal to that of '{owner}', with which it is shared"
                    )
                    del found[f"{start}{path}.{name}.weight"]
    return found, fields


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(
        peft_type="LILY", read=read, peft=PeftRules(own_fields=LilyConfig.not_in_peft, unreadable=targets.conv1d_paths)
    )
    return [Method("lily", LilyConfig, place, rules, learning_rate=1e-3)]
