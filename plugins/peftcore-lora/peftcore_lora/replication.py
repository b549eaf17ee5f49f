"""`layer_replication`: repeated layers of the base, with shared weights and separate adapters.

    [[0, 4], [2, 5]]    layers 0 1 2 3, then 2 3 4

Replication changes the model, which adapters must not do. It is therefore done beforehand, and the config is checked.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from peftcore.plugin import PeftcoreError, has_adapters, validation


def replicate_layers(model: Any, layer_map: Sequence[Sequence[int]]) -> Any:
    """Repeat the layers of a transformers model according to `layer_map`, `[[first, last + 1], ...]`, in order.

    As in Hugging Face PEFT, repeated layers share their weights. The model is changed in place and returned.

    Raises:
        PeftcoreError: the model has adapters, its list of layers is unknown, or a named layer does not exist.
    """
    validation.require(
        not has_adapters(model), "the model has adapters already. Replicate its layers before apply or load"
    )
    owner, name = _layers(model)
    layers = getattr(owner, name)
    order = _order(layer_map)
    validation.require(
        bool(order) and all(0 <= i < len(layers) for i in order),
        f"layer_map={list(layer_map)!r} names layers that do not exist: the model has {len(layers)}",
    )
    copies = [_sharing(layers[i]) for i in order]
    for place, layer in enumerate(copies):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # transformers finds the layer's cache by it
                module.__dict__["layer_idx"] = place
    setattr(owner, name, nn.ModuleList(copies))
    config: Any = getattr(model, "config", None)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in order]
    if hasattr(config, "num_hidden_layers"):
        config.num_hidden_layers = len(copies)
    return model


def check_replicated(model: nn.Module, layer_map: Sequence[Sequence[int]]) -> None:
    """Raise a PeftcoreError unless the layers of `model` are those of `layer_map`."""
    owner, name = _layers(model)
    layers, order = list(getattr(owner, name)), _order(layer_map)
    first = [next(iter(layer.parameters()), None) for layer in layers]
    there = [next(i for i, other in enumerate(first) if other is each) for each in first]
    wanted = [order.index(i) for i in order]
    validation.require(
        there == wanted,
        f"layer_replication={[list(each) for each in layer_map]} needs a model with repeated layers, and the "
        f"{len(layers)} layers of this one are not repeated like that. Call peftcore_lora.replicate_layers(model, "
        "...), which changes the model, and then apply or load",
    )


def _order(layer_map: Sequence[Sequence[int]]) -> list[int]:
    validation.require(
        all(len(each) == 2 for each in layer_map),
        f"layer_replication must have [first, last + 1] for each run of layers, found {list(layer_map)!r}",
    )
    return [i for first, behind in layer_map for i in range(first, behind)]


def _layers(model: Any) -> tuple[Any, str]:
    """Return (module, name) of the list of layers, searched where PEFT searches."""
    while hasattr(model, "model"):
        model = model.model
    model = getattr(model, "bert", model)
    for owner, name in ((model, "layers"), (getattr(model, "encoder", None), "layer"), (model, "h")):
        if isinstance(getattr(owner, name, None), nn.ModuleList):
            return owner, name
    raise PeftcoreError(
        f"{type(model).__name__} has no known list of layers (layers, encoder.layer, h), so they cannot be "
        "replicated. Leave layer_replication out"
    )


def _sharing(layer: nn.Module) -> nn.Module:
    shared = [*layer.parameters(), *layer.buffers()]
    return copy.deepcopy(layer, {id(tensor): tensor for tensor in shared})
