"""`layer_replication`: repeated layers of the base, with shared weights and separate adapters.

    [[0, 4], [2, 5]]    layers 0 1 2 3, then 2 3 4

Replication changes the model, which applying an adapter must not do. So the user calls `replicate_layers` first, and
the method only checks that the model matches the config.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from peftcore.plugin import PeftcoreError, has_adapters, validation


def replicate_layers(model: Any, layer_map: Sequence[Sequence[int]]) -> Any:
    """Repeat the layers of a transformers model in the order of `layer_map`, `[[first, last + 1], ...]`.

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
    copies = [_copy_with_shared_weights(layers[i]) for i in order]
    for position, layer in enumerate(copies):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # the index of the layer's KV cache in transformers
                module.__dict__["layer_idx"] = position
    setattr(owner, name, nn.ModuleList(copies))
    config: Any = getattr(model, "config", None)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in order]
    if hasattr(config, "num_hidden_layers"):
        config.num_hidden_layers = len(copies)
    return model


def check_replicated(model: nn.Module, layer_map: Sequence[Sequence[int]]) -> None:
    """Raise a PeftcoreError unless the layers of `model` are repeated as `layer_map` says."""
    owner, name = _layers(model)
    layers, order = list(getattr(owner, name)), _order(layer_map)
    # Repeated layers share their weights: for each layer, the position of the first one with the same weights.
    weights = [id(next(iter(layer.parameters()), None)) for layer in layers]
    first_positions = [weights.index(weight) for weight in weights]
    expected_positions = [order.index(i) for i in order]
    validation.require(
        first_positions == expected_positions,
        f"layer_replication={[list(run) for run in layer_map]} needs a model with repeated layers, and the "
        f"{len(layers)} layers of this model are not repeated in that order. Call "
        "peftcore_lora.replicate_layers(model, ...), which changes the model, and then apply or load",
    )


def _order(layer_map: Sequence[Sequence[int]]) -> list[int]:
    validation.require(
        all(len(run) == 2 for run in layer_map),
        f"layer_replication must have [first, last + 1] for each run of layers, found {list(layer_map)!r}",
    )
    return [i for start, stop in layer_map for i in range(start, stop)]


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


def _copy_with_shared_weights(layer: nn.Module) -> nn.Module:
    shared = [*layer.parameters(), *layer.buffers()]
    # deepcopy takes tensors in the memo as already copied.
    return copy.deepcopy(layer, {id(tensor): tensor for tensor in shared})
