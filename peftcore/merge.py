"""Merging: one loop for every method and every weight format.

The weight is read through its format in fp32, each active adapter's pure `merged(weight)` is applied,
and the result is rounded once to the stored dtype. The base's parameters are put aside, not
overwritten, so `unmerge` is bit exact.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peftcore import engine
from peftcore.adapted import adapters_of, base_parameters
from peftcore.errors import PeftcoreError
from peftcore.method import WeightFormat
from peftcore.registry import registry
from peftcore.targets import is_conv1d
from peftcore.trained import TrainedParameters

DENSE = WeightFormat(
    name="dense",
    matches=lambda module: isinstance(getattr(module, "weight", None), Tensor) and module.weight.is_floating_point(),
    read=lambda module: module.weight.detach(),
    write=lambda module, weight: {"weight": weight.to(module.weight.dtype)},
)
TRANSPOSED = WeightFormat(
    name="transposed",
    matches=is_conv1d,
    read=lambda module: module.weight.detach().T,
    write=lambda module, weight: {"weight": weight.T.to(module.weight.dtype).contiguous()},
)


@dataclass
class Merged:
    """What `unmerge` needs: the adapters that acted, and the tensors that were put aside, by name."""

    active: tuple[str, ...]
    aside: dict[str, Tensor] = field(default_factory=dict)
    tied: bool | None = None  # the model config's tie_word_embeddings, where merging untied them


def merge(model: nn.Module, *, keep_adapters: bool = True, untie: bool = False) -> nn.Module:
    """Work the active adapters into the base's weights.

    Args:
        keep_adapters: keep the base's own weights aside for `unmerge`. With False the adapters are taken
            off for good, and nothing is kept: the model is a plain one with new weights.
        untie: a weight that another module shares (tied embeddings) is refused, since merging would change
            that module too; with True the adapted module gets a weight of its own.

    Raises:
        PeftcoreError: an adapter cannot be merged, a weight is tied, or a result is not finite. The model
            is then as it was.
    """
    state = engine._require_state(model)
    engine._refuse_merged(state, "merge")
    if not state.active:
        raise PeftcoreError("no adapter is active. Choose what to merge: peftcore.activate(model, [...])")
    _check_mergeable(model, state.active)
    tied = _tied(model, state.active)
    if tied and not untie:
        raise PeftcoreError(
            f"the weight of '{tied[0][0]}' is tied to '{tied[0][1]}', which merging would change too. "
            "merge(model, untie=True) gives the adapted module a weight of its own"
        )
    if keep_adapters:
        new = dict(_merged_tensors(model, state.active))
    else:
        for _ in _merged_tensors(model, state.active):
            pass  # every result is checked before the first is written
        new = _merged_tensors(model, state.active)

    merged = Merged(state.active)
    for name, tensor in list(new.items()) if keep_adapters else new:
        aside = _exchange(model, name, tensor)
        if keep_adapters:
            merged.aside[name] = aside
    if tied:
        merged.tied = _untie_config(model, tied)
    for name in state.active:
        _merge_trained(model, name, merged)
    engine._set_active(model, ())
    if keep_adapters:
        state.merged = merged
    else:
        for name in merged.active:
            engine.remove(model, name)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Put the base's own weights back, bit for bit, and let the merged adapters act again."""
    state = engine._require_state(model)
    if state.merged is None:
        raise PeftcoreError("nothing is merged into this model")
    merged, state.merged = state.merged, None
    for name, tensor in merged.aside.items():
        device = _get(model, name).device
        tensor.data = tensor.data.to(device)  # the model may have moved meanwhile
        _exchange(model, name, tensor)
    if merged.tied is not None:
        model.config.tie_word_embeddings = merged.tied
    engine._set_active(model, merged.active)
    return model


def weight_format(module: nn.Module) -> WeightFormat:
    """The format that reads the weight of `module`; those of plugins are asked first."""
    for candidate in (*registry.weight_formats(), TRANSPOSED, DENSE):
        if candidate.matches(module):
            return candidate
    raise PeftcoreError(f"no weight format reads {type(module).__name__}; a plugin can provide one")


def _check_mergeable(model: nn.Module, names: tuple[str, ...]) -> None:
    cannot = {
        name: path
        for name in names
        for path, adapter in engine.adapter_modules(model, name)
        if not hasattr(adapter, "merged")
    }
    if not cannot:
        return
    method = {name: engine.applied(model, name).method for name in names}
    can = [name for name in names if name not in cannot]
    name, path = next(iter(cannot.items()))
    raise PeftcoreError(
        f"the adapter '{name}' ({method[name]}) cannot be merged: at '{path}' it is no change of a weight. "
        + (
            f"Of the active ones {', '.join(f'{other} ({method[other]})' for other in can)} can: "
            f"peftcore.activate(model, {can}), then merge"
            if can
            else "No active adapter can"
        )
    )


def _merged_tensors(model: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    """(name of a stored tensor, its new value) for every adapted weight, checked to be finite."""
    paths = dict.fromkeys(path for name in names for path in engine.applied(model, name).paths)
    for path in paths:
        module = model.get_submodule(path)
        adapters = adapters_of(module)
        chosen = weight_format(module)
        with torch.no_grad():
            weight = chosen.read(module).float()
            for name in names:
                if name in adapters:
                    weight = adapters[name].merged(weight)
            for attribute, tensor in chosen.write(module, weight).items():
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise PeftcoreError(
                        f"merging {list(names)} into '{path}' gives values that are not finite in {tensor.dtype}. "
                        "The adapter holds NaN or infinity, or the sum overflows; nothing was changed"
                    )
                yield f"{path}.{attribute}" if path else attribute, tensor


def _merge_trained(model: nn.Module, name: str, merged: Merged) -> None:
    """Trained parameters are merged by value: the base's slots get a copy of the adapter's."""
    if not engine.applied(model, name).trained:
        return
    trained = TrainedParameters.of(model, name)
    values = {slot: value.detach().clone() for slot, value in trained.values(model)}
    trained.activate(model, False)
    for first, value in values.items():
        parameter = nn.Parameter(value, requires_grad=False)
        for slot in trained.slots[first]:
            merged.aside.setdefault(slot, _get(model, slot))
            _exchange(model, slot, parameter)


def _tied(model: nn.Module, names: tuple[str, ...]) -> list[tuple[str, str]]:
    """(adapted module, another name of its parameter) for every adapted weight that is shared."""
    paths = {path for name in names for path in engine.applied(model, name).paths}
    by_parameter: dict[int, list[str]] = {}
    for name, parameter in base_parameters(model):
        by_parameter.setdefault(id(parameter), []).append(name)
    shared = [slots for slots in by_parameter.values() if len(slots) > 1]
    return [
        (path, other)
        for slots in shared
        for slot in slots
        for path in [slot.rpartition(".")[0]]
        if path in paths
        for other in slots
        if other != slot
    ]


def _untie_config(model: nn.Module, tied: list[tuple[str, str]]) -> bool | None:
    warnings.warn(f"merge untied '{tied[0][0]}' from '{tied[0][1]}': the model has one more weight now", stacklevel=3)
    config = getattr(model, "config", None)
    before = getattr(config, "tie_word_embeddings", None)
    if before:
        config.tie_word_embeddings = False  # else saving drops the new weight
    return before


def _get(model: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(path), attribute)


def _exchange(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Put `tensor` in place of the parameter or buffer `name`, and return what stood there."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    before = getattr(module, attribute)
    if attribute in module._parameters:
        module._parameters[attribute] = (
            tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        )
    else:
        module._buffers[attribute] = tensor
    return before
