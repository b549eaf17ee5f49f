"""Lily (Zhong et al. 2024, arXiv 2407.09946): y = W x + b + s · (Σ_e p_e B_e) A x, with factors shared by layers.

    x --- A --- h --- B_1 .. B_n ---(+)        A [r, in]: one for each `stride_A` consecutive layers
                |     p_1 .. p_n                B_e [out, r]: n for all layers of the same name and size
                '--- R --- softmax, mean        R [n, r]: the router, one per layer

p is a mean over all tokens of the call. A token's result therefore depends on all others: on padding, on other rows of
the batch and other texts in its row, and on whether earlier tokens are in a cache. The first call with padding warns,
and so does the first with a filled cache. Lily cannot be merged, since p depends on the input.
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
        stride_A: number of consecutive layers of the same name and size that share an A.
        num_B: n, at least 2.
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
        validation.require(self.num_B >= 2, f"num_B must be at least 2 for the router to choose, found {self.num_B}")


def matrix(rows: int, columns: int, random: bool = True) -> nn.Linear:
    """Return a matrix `[rows, columns]` as a module, which layers can share."""
    layer = nn.Linear(columns, rows, bias=False)
    if not random:
        nn.init.zeros_(layer.weight)
    return layer


class Lily(Adapter):
    """A `[r, in]`, B `[n · r, out]` and the router `[n, r]`; x `[..., in]` -> y `[..., out]`."""

    whole_batch = True

    def __init__(self, config: LilyConfig, a: nn.Linear, b: nn.Linear) -> None:
        super().__init__()
        self.scale, self.lily_A, self.lily_B = config.scaling, a, b
        self.lily_router = matrix(config.num_B, config.r)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        a, b, router = (m.weight.to(x.device, x.dtype) for m in (self.lily_A, self.lily_B, self.lily_router))
        h = F.linear(x, a)
        p = F.linear(h, router).softmax(-1).flatten(0, -2).mean(0)  # [n]
        mixed_b = torch.einsum("e,ero->ro", p, b.unflatten(0, (len(p), -1)))
        operands = base.linear_operands(x)
        if operands is not None:
            weight, bias = operands
            return ops.lora_linear(x, weight, bias, a, mixed_b.T, self.scale)
        return base(x) + h @ (self.scale * mixed_b)


class Notice(Adapter):
    """Watches the backbone's calls and warns once about padding and once about a cache; both change the mean."""

    whole_batch = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._names, self._cache_argument = forward_arguments(module), cache_argument(module)
        self._pending = {"padding", "cache"}

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        if self._pending and not torch.compiler.is_compiling():
            self.warn_about(arguments_by_name(self._names, args, kwargs))
        return base(*args, **kwargs)

    def warn_about(self, call: dict[str, Any]) -> None:
        mean = "Lily mixes its factors by a mean over all tokens of a call"
        mask, cache = call.get("attention_mask"), call.get(self._cache_argument or "")
        if "padding" in self._pending and isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.all()):
            self._pending.remove("padding")
            warnings.warn(
                f"{mean}, padding included, so padding changes the result. Use rows of one length",
                stacklevel=2,
            )
        if "cache" in self._pending and cache is not None and cached_tokens(cache) != 0:
            self._pending.remove("cache")
            advice = "Use generate(use_cache=False) to compute each step like a forward over the whole text"
            warnings.warn(f"{mean}, without the tokens in the cache. {advice}", stacklevel=2)


def sharing_groups(layers: Mapping[str, tuple[int, int]], target_modules: str | Sequence[str]) -> list[list[str]]:
    """Return groups of paths whose layers share B: those of equal size that the same target_modules entry selects."""
    entries = [] if isinstance(target_modules, str) else target_modules
    groups: dict[Any, list[str]] = {}
    for path, sizes in layers.items():
        entry = max((name for name in entries if path.endswith(name)), key=len, default=None)
        groups.setdefault((entry, sizes), []).append(path)
    return list(groups.values())


def place(model: nn.Module, config: LilyConfig, architecture: Architecture) -> list[Placement]:
    layers = {path: targets.sizes(module) for path, module in config.selected(model, architecture).items()}
    placements = {}
    for group in sharing_groups(layers, config.target_modules):
        width, out_width = layers[group[0]]
        b = matrix(config.num_B * config.r, out_width, random=not config.init_weights)
        for index, path in enumerate(group):
            if index % config.stride_A == 0:
                a = matrix(config.r, width)
            placements[path] = Around(path, Lily(config, a, b))
    backbone = decoder_path(model, architecture) if not architecture.is_encoder_decoder else architecture.backbone
    notice = Around(backbone, Notice(model.get_submodule(backbone)))
    return [notice, *(placements[path] for path in layers)]


def read(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    """Keep each shared matrix only at its first layer; PEFT writes it for every layer."""
    if model is None:
        return tensors, fields
    start, end = "base_model.model.", ".lily_router.weight"
    paths = {name[len(start) : -len(end)] for name in tensors if name.startswith(start) and name.endswith(end)}
    layers = {path: targets.sizes(m) for path, m in targets.base_modules(model) if path in paths}
    kept_tensors = dict(tensors)
    for group in sharing_groups(layers, fields["target_modules"]):
        for index, path in enumerate(group):
            owners = {"lily_B": group[0], "lily_A": group[index - index % fields["stride_A"]]}
            for name, owner in owners.items():
                tensor = kept_tensors.get(f"{start}{path}.{name}.weight")
                if owner != path and tensor is not None:
                    is_equal = torch.equal(tensor, tensors[f"{start}{owner}.{name}.weight"])
                    validation.require(
                        is_equal,
                        f"'{path}' and '{owner}' share {name}, but the file has different values for them. "
                        "Save the adapter again",
                    )
                    del kept_tensors[f"{start}{path}.{name}.weight"]
    return kept_tensors, fields


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(
        peft_type="LILY", read=read, peft=PeftRules(own_fields=LilyConfig.not_in_peft, unreadable=targets.conv1d_paths)
    )
    return [Method("lily", LilyConfig, place, rules, learning_rate=1e-3)]
