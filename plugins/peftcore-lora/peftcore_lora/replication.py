"""`layer_replication`: layers of the base stand several times in the model, with one weight and adapters of their own.

    [[0, 4], [2, 5]]    layers 0 1 2 3, then 2 3 4

That changes the model, which no adapter may: it is done before, and a config is compared with what stands there.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from peftcore.plugin import PeftcoreError, has_adapters, validation


def replicate_layers(model: Any, layer_map: Sequence[Sequence[int]]) -> Any:
    """Let the layers of a transformers model be those of `layer_map`, `[[first, behind the last], ...]`, in order.

    As Hugging Face PEFT does it: a layer that stands twice has its weights once. The model is changed, and given back.

    Raises:
        PeftcoreError: adapters stand on it, where its layers are is not known, or one that is named is not there.
    """
    validation.require(
        not has_adapters(model), "the model has adapters already. Replicate its layers before apply or load"
    )
    owner, name = _layers(model)
    layers = getattr(owner, name)
    order = _order(layer_map)
    validation.require(
        bool(order) and all(0 <= i < len(layers) for i in order),
        f"layer_map={list(layer_map)!r} names layers that are not there: the model has {len(layers)}",
    )
    copies = [_sharing(layers[i]) for i in order]
    for place, layer in enumerate(copies):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # by which transformers finds the layer's cache
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
        f"layer_replication={[list(each) for each in layer_map]} is of a model whose layers stand several times, and "
        f"this one has {len(layers)} layers that do not. First peftcore_lora.replicate_layers(model, ...), which "
        "changes the model, then apply or load",
    )


def _order(layer_map: Sequence[Sequence[int]]) -> list[int]:
    validation.require(
        all(len(each) == 2 for each in layer_map),
        f"layer_replication has [first, behind the last] for each run of layers, found {list(layer_map)!r}",
    )
    return [i for first, behind in layer_map for i in range(first, behind)]


def _layers(model: Any) -> tuple[Any, str]:
    """(module, name) of the list of layers, which is looked for where PEFT looks."""
    while hasattr(model, "model"):
        model = model.model
    model = getattr(model, "bert", model)
    for owner, name in ((model, "layers"), (getattr(model, "encoder", None), "layer"), (model, "h")):
        if isinstance(getattr(owner, name, None), nn.ModuleList):
            return owner, name
    raise PeftcoreError(
        f"where {type(model).__name__} has its layers is not known (layers, encoder.layer, h), so they cannot be "
        "replicated. Leave layer_replication out"
    )


def _sharing(layer: nn.Module) -> nn.Module:
    shared = [*layer.parameters(), *layer.buffers()]
    return copy.deepcopy(layer, {id(tensor): tensor for tensor in shared})
