"""Weights that several modules share: which of them merging unties."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from peftcore import engine
from peftcore.engine.adaptation.adapted import changes_at
from peftcore.engine.trained import TrainedParameters, tied_to
from peftcore.errors import warn
from peftcore.model.base_modules import base_parameters


def tied_weights(model: nn.Module, names: tuple[str, ...], alike: list[list[str]]) -> list[tuple[str, str]]:
    """Return (adapted module, another name of its parameter) for every adapted weight that is shared.

    Shared parameters in `alike` are left out.
    """
    shared = [slots for slots in _shared(model) if slots not in alike]
    paths = {path for name in names for path in _changed_modules(model, name)} if shared else ()
    return [
        *_trained_apart(model, names),
        *(
            (path, other)
            for slots in shared
            for slot in slots
            for path in [slot.rpartition(".")[0]]
            if path in paths
            for other in slots
            if other != slot
        ),
    ]


def _shared(model: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that has several."""
    by_parameter: dict[int, list[str]] = {}
    for name, parameter in base_parameters(model):
        by_parameter.setdefault(id(parameter), []).append(name)
    return [slots for slots in by_parameter.values() if len(slots) > 1]


def changed_alike(model: nn.Module, names: tuple[str, ...]) -> list[list[str]]:
    """Return the shared parameters that the same adapters change under each name; merged, they stay shared."""
    changed_by: dict[str, list[int]] = {}
    for name in names:
        for path, adapter in engine.adapter_modules(model, name):
            changed_by.setdefault(f"{path}.weight", []).append(id(adapter))
    return [slots for slots in _shared(model) if all(changed_by.get(s, []) == changed_by.get(slots[0]) for s in slots)]


def _changed_modules(model: nn.Module, name: str) -> list[str]:
    """Return the paths of modules whose parameters an adapter changes."""
    found: list[str] = []
    for path, module in engine.modules_with(model, engine.require_state(model), name):
        found.append(path)
        for changed in changes_at(module, name):
            inside = changed.rpartition(".")[0]
            found.append(f"{path}.{inside}".strip(".") if inside else path)
    return found


def _trained_apart(model: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield (module, another name of its parameter) for tied parameters that an adapter trains separately."""
    for name in names:
        own = TrainedParameters.of(model, name)
        for slot, slots in own.slots.items() if own is not None else ():
            tied = tied_to(model, slots)
            if tied:
                yield slot.rpartition(".")[0], tied[0]


def untie_config(model: nn.Module, tied: list[tuple[str, str]]) -> None:
    """Warn that `tied` weights are not tied any more, and record it in the model's config."""
    warn(f"merge untied '{tied[0][0]}' from '{tied[0][1]}', so the model has one more weight")
    config: Any = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", None):
        config.tie_word_embeddings = False  # otherwise saving drops the new weight
