"""AdapterFusion (Pfeiffer et al. 2021, arXiv 2005.00247): combine several bottlenecks of a sublayer into one change.

    attention     p = softmax over i of (Q x + q) · (K f_i(x) + k)       x: input of the bottlenecks, per token
                  x + V Σ_i p_i f_i(x)
    average       x + Σ_i w_i f_i(x)                                     given weights w, with sum 1
    split         x + f_i(x)                                             i depends on the token's position

The f_i are adapters that the model already has (method `adapter`), on the same modules, and frozen. V starts near the
identity, Q and K at random. With attention, 3 d² + 2 d numbers per module are trained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from peftcore_adapter import AfterNorm, Bottleneck, Series, after_norm
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
    """Config of a fusion. Fields that AdapterHub's `DynamicAdapterFusionConfig` also has have the same names.

    Args:
        adapters: names of bottleneck adapters that the model has.
        how: "attention", "average" or "split".
        query, key, value: whether to use Q, K and V. Without a projection, vectors are used unchanged.
        regularization: add 0.01 · |V - 1|² to the loss, as AdapterHub's library does.
        dropout_prob: dropout probability of the scores.
        weights: for "average", a weight for each adapter. None: equal weights.
        splits: for "split", the number of tokens for each adapter, in order; their sum must be the text's length.
        modules_to_save: modules to train in full as well. None means a classifier's head.
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
        require(
            count > 0, ("adapters is empty. Apply or load the adapters to fuse, then pass their names: adapters=[...]")
        )
        for name, values, how in (("weights", self.weights, "average"), ("splits", self.splits, "split")):
            require(values is None or self.how == how, f"{name} only works with how={how!r}, found how={self.how!r}")
            require(
                values is None or len(values) == count,
                f"{name} needs one entry for each of {count} adapters, found {list(values or ())}",
            )
        require(
            self.weights is None or sum(self.weights) != 0,
            f"weights must not add up to 0, found {list(self.weights or ())}",
        )
        require(
            self.how != "split" or self.splits is not None,
            "how='split' needs splits=[...], the number of tokens for each adapter",
        )
        require(
            all(number > 0 for number in self.splits or ()),
            f"splits must be positive numbers of tokens, found {list(self.splits or ())}",
        )


class Projection(nn.Linear):
    """Linear layer in the dtype of its input.

    It is a module, since DeepSpeed's ZeRO-3 gathers the weights of called modules.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Fusion(Adapter):
    """Fuses the adapters of one module: maps x `[..., width]` to one change `[..., width]` that replaces theirs."""

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
        """Return the change to add for input x; `base` is the link of the chain that has the branches."""
        adapters: list[Bottleneck] = [cast(Bottleneck, base.branch(name).adapter) for name in self.names]
        if self.config.how == "average":
            return torch.stack([w * f.change(x) for w, f in zip(self.weights, adapters, strict=True)]).sum(0)
        if self.config.how == "split":
            splits = list(self.config.splits or ())
            message = f"splits={splits} add up to {sum(splits)} tokens, but the text has {x.shape[1]}"
            validation.require(x.dim() == 3 and sum(splits) == x.shape[1], message)
            parts = zip(adapters, x.split(splits, dim=1), strict=True)
            return torch.cat([f.change(part) for f, part in parts], 1)
        ups = torch.stack([f.up(x) for f in adapters], -2)  # [..., adapters, width]
        query, keys = self._project("query", x), self._project("key", ups)
        scores = F.dropout((keys @ query[..., None]).squeeze(-1), self.config.dropout_prob, self.training)
        fused = (scores.softmax(-1)[..., None, :] @ ups).squeeze(-2)
        return self._project("value", fused)

    def _project(self, name: str, x: Tensor) -> Tensor:
        layer = self._modules.get(name)
        return x if layer is None else cast(Tensor, layer(x))


class FusedSeries(Fusion):
    """Fusion after a module, for adapters of type `Series`."""

    def forward(self, base: BranchedBase, *args: Any, **kwargs: Any) -> Any:
        output = base(*args, **kwargs)
        x = first_of(output)
        return with_first(output, x + self.change(x, base))


class FusedAfterNorm(Fusion):
    """Fusion around a norm, for adapters of type `AfterNorm`."""

    is_after_norm = True

    def forward(self, base: BranchedBase, z: Tensor) -> Any:
        return after_norm(self, base, z)


def bottlenecks(model: nn.Module, name: str) -> dict[str, Bottleneck]:
    """Return an adapter's bottlenecks by the path of their module.

    Raises:
        PeftcoreError: the model has no such adapter, or it has modules other than bottlenecks after sublayers.
    """
    adapter_record = other_adapter(model, name)
    by_path: dict[str, Bottleneck] = {}
    for path, adapter in adapter_record.modules.items():
        if not isinstance(adapter, (Series, AfterNorm)):
            raise PeftcoreError(
                f"'{name}' ({adapter_record.method}) has a {type(adapter).__name__} at '{path}', which cannot be "
                "fused. Fuse bottlenecks after sublayers (is_parallel=False, inv_adapter=None)"
            )
        by_path[path] = adapter
    return by_path


def place(model: nn.Module, config: AdapterFusionConfig, architecture: Architecture) -> list[Placement]:
    by_name = {name: bottlenecks(model, name) for name in config.adapters}
    reference = by_name[config.adapters[0]]
    for name, modules in by_name.items():
        paths = sorted(modules.keys() | reference.keys())
        differing = [path for path in paths if type(modules.get(path)) is not type(reference.get(path))]
        validation.require(
            not differing,
            f"fused adapters must have the same bottlenecks at the same modules: '{config.adapters[0]}' and '{name}' "
            f"differ at {differing[:3]}",
        )

    def fusion(adapter: Bottleneck) -> Fusion:
        fusion_class = FusedAfterNorm if isinstance(adapter, AfterNorm) else FusedSeries
        return fusion_class(config, adapter.width)

    return [Around(path, fusion(f), branches=tuple(config.adapters)) for path, f in reference.items()]


def loss(adapters: Mapping[str, Any], config: AdapterFusionConfig) -> Tensor | None:
    values = [f.value.weight for f in adapters.values() if "value" in f._modules and config.regularization]
    distances = [
        (value - torch.eye(len(value), device=value.device, dtype=value.dtype)).square().sum() for value in values
    ]
    return 0.01 * torch.stack([term.to(distances[0].device) for term in distances]).sum() if distances else None


KEY = re.compile(r"(?P<place>.+)\.adapter_fusion_layer\.(?P<names>[^.]+)\.(?P<tensor>(?:query|key|value)\.\w+)")


def read(model: nn.Module, fields: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Return the config and tensors of a fusion that AdapterHub's `adapters` saved."""
    settings, names = fields["config"], [str(name) for name in fields.get("adapter_names") or fields["name"].split(",")]
    for name in ("query_before_ln", "residual_before", "temperature"):
        validation.require(
            not settings.get(name), f"it uses {name}={settings.get(name)!r}, which peftcore's fusion does not support"
        )
    dropout_prob = settings.get("dropout_prob") or getattr(
        getattr(model, "config", None), "attention_probs_dropout_prob", 0.0
    )
    options = {name: settings[name] for name in ("query", "key", "value", "regularization") if name in settings}
    config = AdapterFusionConfig(names, dropout_prob=dropout_prob, modules_to_save=(), **options)
    sublayers, renamed = detect(model).sublayers, {}
    modules = bottlenecks(model, names[0])
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            raise PeftcoreError(f"its tensor '{key}' does not belong to a fusion")
        sublayer = sublayer_at(match["place"], sublayers)
        path = next((p for p in (sublayer.norm, sublayer.stream, sublayer.output) if p in modules), None)
        validation.require(
            path is not None, f"'{names[0]}' has no bottleneck at '{match['place']}', where the file has a fusion"
        )
        renamed[f"base_model.model.{path}.{match['tensor']}"] = tensor
    return config, renamed


def matches(fields: dict[str, Any]) -> bool:
    """Return whether the fields come from an adapter_fusion_config.json."""
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
