"""AdapterFusion (Pfeiffer et al. 2021, arXiv 2005.00247): several bottlenecks of a sublayer, combined into one change.

    attention     p = softmax over i of (Q x + q) · (K f_i(x) + k)       x: input of the bottlenecks, per token
                  x -> + V (sum over i of p_i f_i(x))
    average       x -> + (sum over i of w_i f_i(x))                      w given, sum 1
    split         x -> + f_i(x)                                          i given by the token's position

The f_i are existing adapters of the model (method `adapter`), attached to the same modules, and are frozen. V starts as
the identity, Q and K at random. Trained: 3 d² + 2 d numbers per module (attention).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from peftcore_adapter import BehindNorm, Bottleneck, Series, behind_norm
from peftcore_adapter.hub import sublayer_at
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.plugin import (
    Adapter,
    Architecture,
    Around,
    BranchedBase,
    ForeignFormat,
    Method,
    PeftcoreError,
    Placement,
    StateRules,
    detect,
    first_of,
    hookimpl,
    other_adapter,
    validation,
    with_first,
)

peftcore_api = ">=3.0,<4"


@dataclass(frozen=True)
class AdapterFusionConfig:
    """Config of a fusion; fields that AdapterHub's `DynamicAdapterFusionConfig` has, too, have the same name.

    Args:
        adapters: names of bottleneck adapters of the model.
        how: "attention", "average" or "split".
        query, key, value: whether there is a Q, a K and a V. Without one, vectors are used unchanged.
        regularization: add 0.01 · |V - 1|² to the loss, as AdapterHub's library does.
        dropout_prob: dropout probability of the scores.
        weights: for "average", a weight per adapter. None: equal weights.
        splits: for "split", the number of tokens for each adapter, in order; their sum is the text's length.
        modules_to_save: modules to train in full as well. None: a classifier's head.
    """

    adapters: Sequence[str] = ()
    how: Literal["attention", "average", "split"] = "attention"
    query: bool = True
    key: bool = True
    value: bool = True
    regularization: bool = True
    dropout_prob: float = 0.0
    weights: Sequence[float] | None = None
    splits: Sequence[int] | None = None
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        validation.check_types(self)
        validation.probability(dropout_prob=self.dropout_prob)
        count, require = len(self.adapters), validation.require
        require(count > 0, "adapters is empty. Apply or load the adapters to fuse, then name them: adapters=[...]")
        for name, values, how in (("weights", self.weights, "average"), ("splits", self.splits, "split")):
            require(values is None or self.how == how, f"{name} goes with how={how!r}, found how={self.how!r}")
            require(values is None or len(values) == count, f"{name} has one entry for each of {count} adapters")
        require(
            self.weights is None or sum(self.weights) != 0, f"weights add up to 0, found {list(self.weights or ())}"
        )
        require(
            self.how != "split" or self.splits is not None, "how='split' needs splits=[...], tokens for each adapter"
        )
        require(all(number > 0 for number in self.splits or ()), "splits are positive numbers of tokens")


class Projection(nn.Linear):
    """Linear layer in the dtype of its input. It is called as a module, so DeepSpeed's ZeRO-3 gathers its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Fusion(Adapter):
    """Fusion of the adapters of one module: x `[..., width]` -> the change `[..., width]` that replaces theirs."""

    def __init__(self, config: AdapterFusionConfig, width: int) -> None:
        super().__init__()
        self.config, self.names = config, tuple(config.adapters)
        weights = config.weights or [1 / len(self.names)] * len(self.names)
        self.weights = [float(w) / sum(weights) for w in weights]
        if config.how == "attention":
            for name in ("query", "key"):
                if getattr(config, name):
                    layer = Projection(width, width)
                    nn.init.normal_(layer.weight, std=0.02)
                    nn.init.zeros_(layer.bias)
                    setattr(self, name, layer)
            if config.value:
                self.value = Projection(width, width, bias=False)
                nn.init.constant_(self.value.weight, 1e-6)
                with torch.no_grad():
                    self.value.weight.fill_diagonal_(1.0)

    def change(self, x: Tensor, base: BranchedBase) -> Tensor:
        """Return the change for the input x; `base` is the link that has the branches."""
        adapters: list[Bottleneck] = [cast(Bottleneck, base.branch(name).adapter) for name in self.names]
        if self.config.how == "average":
            return torch.stack([w * f.change(x) for w, f in zip(self.weights, adapters, strict=True)]).sum(0)
        if self.config.how == "split":
            splits = list(self.config.splits or ())
            found = f"splits={splits} add up to {sum(splits)} tokens, and the text has {x.shape[1]}"
            validation.require(x.dim() == 3 and sum(splits) == x.shape[1], found)
            parts = zip(adapters, x.split(splits, dim=1), strict=True)
            return torch.cat([f.change(part) for f, part in parts], 1)
        ups = torch.stack([f.up(x) for f in adapters], -2)  # [..., adapters, width]
        query, keys = self._of("query", x), self._of("key", ups)
        scores = F.dropout((keys @ query[..., None]).squeeze(-1), self.config.dropout_prob, self.training)
        mixed = (scores.softmax(-1)[..., None, :] @ ups).squeeze(-2)
        return self._of("value", mixed)

    def _of(self, name: str, x: Tensor) -> Tensor:
        layer = self._modules.get(name)
        return x if layer is None else cast(Tensor, layer(x))


class FusedSeries(Fusion):
    """Fusion after a module, for adapters of type `Series`."""

    def forward(self, base: BranchedBase, *args: Any, **kwargs: Any) -> Any:
        output = base(*args, **kwargs)
        x = first_of(output)
        return with_first(output, x + self.change(x, base))


class FusedBehindNorm(Fusion):
    """Fusion around a norm, for adapters of type `BehindNorm`."""

    is_behind_norm = True

    def forward(self, base: BranchedBase, z: Tensor) -> Any:
        return behind_norm(self, base, z)


def bottlenecks(model: nn.Module, name: str) -> dict[str, Bottleneck]:
    """Return the bottlenecks of an adapter by the path of their module.

    Raises:
        PeftcoreError: there is no such adapter, or it has other modules than bottlenecks after sublayers.
    """
    other = other_adapter(model, name)
    found: dict[str, Bottleneck] = {}
    for path, adapter in other.modules.items():
        if not isinstance(adapter, (Series, BehindNorm)):
            raise PeftcoreError(
                f"'{name}' ({other.method}) has a {type(adapter).__name__} at '{path}', which cannot be fused. Fuse "
                "bottlenecks behind sublayers (is_parallel=False, inv_adapter=None)"
            )
        found[path] = adapter
    return found


def place(model: nn.Module, config: AdapterFusionConfig, architecture: Architecture) -> list[Placement]:
    each = {name: bottlenecks(model, name) for name in config.adapters}
    first = each[config.adapters[0]]
    for name, found in each.items():
        apart = sorted(
            path for path in found.keys() | first.keys() if type(found.get(path)) is not type(first.get(path))
        )
        validation.require(
            not apart,
            f"fused adapters must have the same bottlenecks at the same modules: '{config.adapters[0]}' and '{name}' "
            f"differ at {apart[:3]}",
        )

    def fusion(adapter: Bottleneck) -> Fusion:
        kind = FusedBehindNorm if isinstance(adapter, BehindNorm) else FusedSeries
        return kind(config, adapter.width)

    return [Around(path, fusion(f), branches=tuple(config.adapters)) for path, f in first.items()]


def loss(adapters: Mapping[str, Any], config: AdapterFusionConfig) -> Tensor | None:
    values = [f.value.weight for f in adapters.values() if "value" in f._modules and config.regularization]
    apart = [(value - torch.eye(len(value), device=value.device, dtype=value.dtype)).square().sum() for value in values]
    return 0.01 * torch.stack([term.to(apart[0].device) for term in apart]).sum() if apart else None


KEY = re.compile(r"(?P<place>.+)\.adapter_fusion_layer\.(?P<names>[^.]+)\.(?P<tensor>(?:query|key|value)\.\w+)")


def read(model: nn.Module, fields: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Return the config and tensors of a fusion saved by AdapterHub's `adapters`."""
    theirs, names = fields["config"], [str(name) for name in fields.get("adapter_names") or fields["name"].split(",")]
    for name in ("query_before_ln", "residual_before", "temperature"):
        validation.require(
            not theirs.get(name), f"it uses {name}={theirs.get(name)!r}, which peftcore's fusion does not have"
        )
    drop = theirs.get("dropout_prob") or getattr(getattr(model, "config", None), "attention_probs_dropout_prob", 0.0)
    kept = {name: theirs[name] for name in ("query", "key", "value", "regularization") if name in theirs}
    config = AdapterFusionConfig(names, dropout_prob=drop, modules_to_save=(), **kept)
    known, found = detect(model).sublayers, {}
    existing = bottlenecks(model, names[0])
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            raise PeftcoreError(f"its tensor '{key}' does not belong to a fusion")
        sublayer = sublayer_at(match["place"], known)
        path = next((p for p in (sublayer.norm, sublayer.stream, sublayer.output) if p in existing), None)
        validation.require(
            path is not None, f"'{names[0]}' has no bottleneck at '{match['place']}', where the file has a fusion"
        )
        found[f"base_model.model.{path}.{match['tensor']}"] = tensor
    return config, found


def matches(fields: dict[str, Any]) -> bool:
    """Return whether the fields are those of an adapter_fusion_config.json."""
    return isinstance(fields.get("config"), dict) and isinstance(fields.get("name"), str)


@hookimpl
def peftcore_methods() -> list[Method]:
    foreign = ForeignFormat(
        "the library adapters",
        "model_adapter_fusion.safetensors",
        matches,
        read,
        lambda fields: dict(fields["config"]),
        config="adapter_fusion_config.json",
    )
    rules = StateRules(peft_type="ADAPTER_FUSION", formats=(foreign,))
    return [Method("adapter-fusion", AdapterFusionConfig, place, rules, loss=loss, learning_rate=1e-3)]
