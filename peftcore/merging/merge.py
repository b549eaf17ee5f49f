"""Merging: one loop for every method and every weight format.

The weight is read through its format in fp32, each active adapter's pure `merged(weight, bias)` is applied, and the
result is rounded once to the stored dtype. The base's parameters are kept, not overwritten, so `unmerge` is bit exact.
Before anything is written, each layer is run both ways (probe.py).

The error of merging into a quantized weight is measured per layer (merged_layers.py), and refused above a limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peftcore import engine, ranks
from peftcore.adaptation.adapted import changes_at, is_adapted
from peftcore.adaptation.base_modules import base_parameters
from peftcore.engine.applying import check_dtype
from peftcore.engine.changes import facts, module_at
from peftcore.engine.trained import TrainedParameters, tied_to
from peftcore.errors import PeftcoreError, warn
from peftcore.merging.merged_layers import MergedLayer, measured_error, merged_layers, refuse_unmergeable
from peftcore.method import Model, WeightFormat
from peftcore.observation.detecting import mark_as_loaded


@dataclass
class Merged:
    """State for `unmerge`: the adapters that were active, and the original tensors by name."""

    active: tuple[str, ...]
    aside: dict[str, Tensor] = field(default_factory=dict)
    tied: bool | None = None  # the model config's tie_word_embeddings, if merging untied them
    lost: dict[str, float] = field(default_factory=dict)  # by path, for quantized weights
    written: dict[str, tuple[torch.Size, torch.dtype]] = field(default_factory=dict)  # the merged tensors
    unpacked: tuple[WeightFormat, ...] = ()  # formats of quantized weights that dense ones replace


@engine.exclusive("merge", base=True)
def merge(
    model: Model,
    *,
    keep_adapters: bool = True,
    untie: bool = False,
    dtype: torch.dtype | None = None,
    max_error: float | None = 0.1,
) -> Model:
    """Merge the active adapters into the base's weights.

    Args:
        model: the model.
        keep_adapters: keep the original weights for `unmerge`. If False, the adapters are removed and nothing is kept:
            the model is a plain model with new weights.
        untie: merge into a weight that another module shares (tied embeddings) by giving the adapted module its own
            copy. By default such a weight is an error, because merging would change the other module too.
        dtype: replace quantized weights that adapters change by dense ones of this dtype. With `keep_adapters=False`
            the whole model is cast to it. By default they are quantized again, see `max_error`.
        max_error: largest fraction of the adapters' change that quantizing again may lose in any layer, see
            `merge_error`; None for no limit.

    Returns:
        The model.

    Raises:
        PeftcoreError: an adapter cannot be merged, or the merged weight would not compute the same; a weight is tied; a
            result is NaN or Inf; or quantizing again would lose more than `max_error`. The model is left unchanged.
    """
    _check_limit(max_error)
    check_dtype(dtype)
    state = _ready(model, "merge")
    if not state.active:
        raise PeftcoreError("no adapter is active. Activate the adapters to merge: peftcore.activate(model, [...])")
    refuse_unmergeable(model, state.active)
    for name in () if keep_adapters else state.active:
        engine.refuse_needed(state, name)
    alike = _changed_alike(model, state.active)
    tied = _tied(model, state.active, alike)
    if tied and not untie:
        raise PeftcoreError(
            f"the weight of '{tied[0][0]}' is tied to '{tied[0][1]}', which merging would change too. Call "
            "merge(model, untie=True) to give the adapted module its own weight"
        )
    with ranks.whole_when_read(model):
        return _merge(model, state, alike, tied, keep_adapters=keep_adapters, dtype=dtype, max_error=max_error)


def _merge(
    model: Model,
    state: engine.State,
    alike: list[list[str]],
    tied: list[tuple[str, str]],
    *,
    keep_adapters: bool,
    dtype: torch.dtype | None,
    max_error: float | None,
) -> Model:
    layers: Iterable[MergedLayer]
    if keep_adapters:
        layers = kept = list(merged_layers(model, state.active, dtype))
        lost = {layer.path: layer.lost for layer in kept if layer.lost is not None}
    else:  # every result is checked before the first is written, and none is kept in between
        lost = measured_error(model, state.active, dtype)
        layers = merged_layers(model, state.active, dtype, checked=True)
    _check_lost(lost, max_error)

    merged = Merged(state.active, lost=lost)
    for name in state.active:
        _merge_trained(model, name, merged)
    unpacked: dict[str, WeightFormat] = {}
    first = {slot: slots[0] for slots in alike for slot in slots}
    written: dict[str, Tensor] = {}  # under the first name of a parameter that stays tied
    for layer in layers:
        for name, tensor in layer.named():
            if name in first:
                tensor = written.setdefault(first[name], nn.Parameter(tensor, requires_grad=False))
            aside = _exchange(model, name, tensor)
            if keep_adapters:
                merged.aside.setdefault(name, aside)
        if layer.unpacked is not None:
            unpacked[layer.path] = layer.unpacked
    if tied:
        merged.tied = _untie_config(model, tied)
    engine.set_active(model, (), base_exchanged=True)
    if keep_adapters:
        merged.written = {name: (t.shape, t.dtype) for name in merged.aside for t in [_get(model, name)]}
        merged.unpacked = tuple(unpacked.values())
        state.merged = merged
    else:
        for path, site in state.sites.items():  # a weight that was packed has a different shape now
            site.facts = facts(model.get_submodule(path))
        for name in merged.active:
            engine.remove(model, name)
        for path, was in unpacked.items():
            module = model.get_submodule(path)
            if was.plain is not None and not is_adapted(module):
                was.plain(module)
        if unpacked:
            model.to(dtype)
    _update_config(model, unpacked.values())
    return model


def _ready(model: nn.Module, what: str) -> engine.State:
    """Return the record of a model whose adapters can be merged; `what` names the operation in messages."""
    state = engine.require_state(model)
    engine.refuse_merged(state, what)
    engine.refuse_changed(model)
    if not engine.follows_plan(model):
        ranks.refuse_sharded(model, what)
    engine.refuse_per_sample(state, what)
    return state


@engine.exclusive("measure the error of merging")
def merge_error(model: nn.Module) -> dict[str, float]:
    """Return the fraction of the active adapters' change that `merge` would lose in each quantized layer, by path.

    0 means no loss, 1 means that the error is as large as the change itself. Dense layers are not listed. The model is
    not changed.
    """
    state = _ready(model, "measure the error of merging")
    refuse_unmergeable(model, state.active)
    with ranks.whole_when_read(model):
        return measured_error(model, state.active, None)


@engine.exclusive("unmerge", base=True)
def unmerge(model: Model) -> Model:
    """Restore the original weights, bit for bit, and activate the merged adapters again.

    If the model was moved or cast since, the weights are moved and cast with it.

    Returns:
        The model.

    Raises:
        PeftcoreError: nothing is merged, or a merged weight has a different size now. The model is left unchanged.
    """
    state = engine.require_state(model)
    if state.merged is None:
        raise PeftcoreError("nothing is merged into this model. Call peftcore.merge(model) first")
    there = {name: _get(model, name) for name in state.merged.written}  # may have been moved or cast since
    for name, (shape, _) in state.merged.written.items():
        found = there[name]
        if found is None or found.shape != shape:
            what = "gone" if found is None else f"of shape {list(found.shape)}"
            raise PeftcoreError(
                f"'{name}' is {what} and was {list(shape)} when it was merged (resized?), so the original does "
                "not fit. Undo the resize first, or keep the model merged"
            )
    merged, state.merged = state.merged, None
    config: Any = getattr(model, "config", None)
    for name, tensor in merged.aside.items():
        now = there.pop(name)
        is_cast = now.dtype is not merged.written[name][1] and tensor.is_floating_point()
        tensor.data = tensor.data.to(now.device, now.dtype if is_cast else tensor.dtype)
        _exchange(model, name, tensor)
    if merged.tied is not None:
        config.tie_word_embeddings = merged.tied
    _update_config(model, merged.unpacked)
    engine.set_active(model, merged.active, base_exchanged=True)
    return model


def _update_config(model: nn.Module, formats: Iterable[WeightFormat]) -> None:
    for update in dict.fromkeys(each.update_config for each in formats if each.update_config is not None):
        update(model)


def _check_limit(max_error: Any) -> None:
    is_number = isinstance(max_error, (int, float)) and not isinstance(max_error, bool)
    if max_error is not None and not (is_number and max_error >= 0):
        raise PeftcoreError(
            f"max_error must be a number from 0 up, a share of the adapters' change, or None for no limit, found "
            f"{max_error!r}"
        )


def _check_lost(lost: dict[str, float], max_error: float | None) -> None:
    if not lost:
        return
    worst = max(lost, key=lambda path: lost[path])
    mean = sum(lost.values()) / len(lost)
    what = (
        f"{len(lost)} merged layers are quantized again, which loses {mean:.0%} of the adapters' change on "
        f"average, at worst {lost[worst]:.0%} ('{worst}')"
    )
    if max_error is not None and lost[worst] > max_error:
        raise PeftcoreError(
            f"{what}; max_error={max_error:g} allows {max_error:.0%}. Nothing was changed. Merge into 16 bits: "
            "peftcore.merge(model, dtype=torch.bfloat16). For each layer's error: peftcore.merge_error(model)"
        )
    warn(what)


def _merge_trained(model: nn.Module, name: str, merged: Merged) -> None:
    """Merge an adapter's own copies of base tensors: the base's slots get a copy of their values."""
    own = TrainedParameters.of(model, name)
    if own is None:
        return
    values = [(slots, value.detach().clone()) for slots, value, _ in own.in_model(model)]
    own.activate(model, False)
    own.hold(model, ())
    for slots, value in values:
        is_parameter = isinstance(_get(model, slots[0]), nn.Parameter)
        tensor = nn.Parameter(value, requires_grad=False) if is_parameter else value
        for slot in slots:
            merged.aside.setdefault(slot, _get(model, slot))
            _exchange(model, slot, tensor)


def _tied(model: nn.Module, names: tuple[str, ...], alike: list[list[str]]) -> list[tuple[str, str]]:
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


def _changed_alike(model: nn.Module, names: tuple[str, ...]) -> list[list[str]]:
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


def _untie_config(model: nn.Module, tied: list[tuple[str, str]]) -> bool | None:
    warn(f"merge untied '{tied[0][0]}' from '{tied[0][1]}', so the model has one more weight")
    config: Any = getattr(model, "config", None)
    before = getattr(config, "tie_word_embeddings", None)
    if before:
        config.tie_word_embeddings = False  # otherwise saving drops the new weight
    return before


def _get(model: nn.Module, name: str) -> Any:
    """Return a parameter or buffer by name, or None if it or its module does not exist."""
    path, _, attribute = name.rpartition(".")
    return getattr(module_at(model, path), attribute, None)


def _exchange(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Replace the parameter or buffer `name` by `tensor`, and return the old one."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    before: Tensor = ranks.behind(getattr(module, attribute))
    held = getattr(module, "held_part", None) if attribute == "weight" else None
    if attribute in module._parameters:
        if held is not None:
            if tensor.is_floating_point() and not ranks.is_dtensor(tensor):
                tensor = held.dtensor(held.of(tensor))
        elif ranks.is_dtensor(before) and not ranks.is_dtensor(tensor):
            tensor = ranks.divided_as(tensor, before)
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        mark_as_loaded(tensor, before)
        module._parameters[attribute] = tensor
    else:
        module._buffers[attribute] = tensor
    return before
