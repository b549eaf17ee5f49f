"""Tensors of an applied adapter under their names on disk: which to write, and how to read those of a file.

own        what the adapter trains, once each
exported   what other libraries read in addition: another form of the own ones, and each name of a tied parameter
kept       buffers that training has moved, and all buffers in modules that are trained as a whole
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from peftcore import engine
from peftcore.engine.trained_parameters import TrainedParameters, base_tensors, tied_to
from peftcore.errors import CheckpointError, PeftcoreError, nearest
from peftcore.files import resized_vocabulary
from peftcore.model import targets
from peftcore.model.base_modules import base_modules
from peftcore.plugin import sharded
from peftcore.plugin.method import Method, StateRules
from peftcore.plugin.modules import own_tensors
from peftcore.plugin.peft_keys import key_of_trained, name_in_base
from peftcore.plugin.placements.train import Train
from peftcore.plugin.registry import registry


def tensors_on_disk(model: nn.Module, adapter: str, *, own: bool = True, exported: bool = False) -> dict[str, Tensor]:
    """Return the tensors of an applied adapter under their names on disk, without the kept ones.

    Args:
        own: include those of modules that have exported ones.
        exported: include those for other readers.
    """
    entry = engine.applied(model, adapter)
    rules = registry.method(entry.method).state
    tensors: dict[str, Tensor] = {}
    written: set[int] = set()  # the first adapter writes the tensors of a module that several share

    def add(named: Iterable[tuple[str, Tensor]], said_by: str) -> None:
        for on_disk, tensor in named:
            if tensors.setdefault(on_disk, tensor) is not tensor:
                raise PeftcoreError(
                    f"{entry.method} gives two tensors the name '{on_disk}'; {said_by} must tell them apart"
                )

    with registry.naming(entry.method, "tensor_name"):
        for placement in engine.placements(model, adapter):
            others: Mapping[str, Tensor] = {}
            if exported and rules.export is not None:
                with registry.naming(entry.method, "export"), sharded.gathered_parameters(placement.adapter):
                    others = rules.export(placement)
                add(others.items(), "export")
            if own or not others:
                named = []
                for name, tensor in own_tensors(placement.adapter).items():
                    if id(tensor) not in written:
                        written.add(id(tensor))
                        named.append((rules.tensor_name(placement, name), tensor))
                add(named, "tensor_name")
    owned = TrainedParameters.of(model, adapter)
    if owned is not None:
        for name, parameter in owned.values(model):
            for slot in owned.slots[name] if exported else (name,):
                add([(_base_name(rules, entry, slot), parameter)], "tensor_name")
    return tensors


def kept_on_disk(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Return the kept tensors to write: those that another load of the base would not have.

    These are tensors that differ from the base, buffers in modules that are trained as a whole, and a resized
    vocabulary.
    """
    entry = engine.applied(model, adapter)
    rules, base = registry.method(entry.method).state, base_tensors(model)
    owned = TrainedParameters.of(model, adapter)
    saved = getattr(entry.config, "modules_to_save", None) or ()
    whole: set[str] = set()
    for path, module in base_modules(model) if saved else ():
        if path and any(targets.is_inside(pattern, path) for pattern in saved):
            persistent = module._buffers.keys() - module._non_persistent_buffers_set
            whole.update(f"{path}.{name}" for name in persistent if module._buffers[name] is not None)
    kept = {name: model.get_buffer(name) for name in sorted(whole)}
    owned_slots = own_slots(model, adapter)
    kept.update({name: base[name] for name in resized_vocabulary.resized(model) if name not in owned_slots})
    if owned is not None:
        for name, tensor in owned.kept_values(model):
            if name in kept or not torch.equal(tensor, base[name]):
                kept.update(dict.fromkeys(owned.kept[name], tensor))
    return {_base_name(rules, entry, name): tensor for name, tensor in kept.items()}


def grown_buffers(model: nn.Module, adapter: str, tensors: Mapping[str, Tensor]) -> list[tuple[nn.Module, str, Tensor]]:
    """Return (module, name, empty buffer of the new shape) for buffers of an adapter with other shapes in `tensors`."""
    rules, grown = registry.method(engine.applied(model, adapter).method).state, []
    for placement in engine.placements(model, adapter):
        for name, tensor in own_tensors(placement.adapter).items():
            stored = tensors.get(rules.tensor_name(placement, name))
            if stored is not None and stored.shape != tensor.shape and not isinstance(tensor, nn.Parameter):
                path, _, last = name.rpartition(".")
                grown.append((placement.adapter.get_submodule(path), last, tensor.new_empty(stored.shape)))
    return grown


def fill(model: nn.Module, adapter: str, tensors: dict[str, Tensor], folder: Path, *, partly_tied: bool = True) -> None:
    """Copy `tensors` into the applied `adapter`; none may be missing, unexpected or of another shape.

    Args:
        partly_tied: a tied parameter may be in the file under only one of its names.
    """
    sharded.reshard(model)
    tensors = dict(tensors)
    expected = exported = tensors_on_disk(model, adapter)
    if registry.method(engine.applied(model, adapter).method).state.export is not None or own_slots(model, adapter):
        exported = tensors_on_disk(model, adapter, exported=True)  # equal to the adapter's own tensors
        _untie(tensors, expected, exported, folder, type(model).__name__, partly_tied)
    values = _take_kept(model, adapter, tensors)
    embeddings: dict[str, Tensor] = {}
    if tensors.keys() - expected.keys():
        embeddings = _take_embeddings(model, adapter, tensors, expected, folder)
        _drop_repeats(model, tensors, expected, exported)
    missing = sorted(expected.keys() - tensors.keys() - for_training(model, adapter))
    _refuse_other_names(missing, sorted(tensors.keys() - expected.keys()), folder, type(model).__name__)
    values += [_Value(name, tensor, expected[name]) for name, tensor in tensors.items()]
    for value in values:
        _refuse_unfit(value, folder, type(model).__name__)
    with torch.no_grad():
        for value in values:
            sharded.fill(value.target, value.tensor)
    if embeddings:
        state = engine.require_state(model)
        TrainedParameters.keep(model, adapter, embeddings)
        engine.set_active(model, state.active, state.samples)


@dataclass(frozen=True)
class _Value:
    """A tensor of a file, its name there, and the tensor that gets its values."""

    name: str
    tensor: Tensor
    target: Tensor


def _drop_repeats(
    model: nn.Module, tensors: dict[str, Tensor], expected: Mapping[str, Tensor], exported: Mapping[str, Tensor]
) -> None:
    """Delete from `tensors` what only repeats others: exported forms of the adapter's own, and copies of the base's."""
    base = _values_of_base(model)
    for name in [name for name in tensors if name not in expected]:
        if name in exported or _is_copy_of_base(base, name, tensors[name]):
            del tensors[name]


def _refuse_other_names(missing: Sequence[str], unexpected: Sequence[str], folder: Path, model: str) -> None:
    """Raise a CheckpointError if tensors are missing or unexpected. It names what may have been meant."""
    problems: list[str] = []
    if missing:
        guess = nearest(missing[0], unexpected, 1)
        problems.append(f"{len(missing)} tensors are missing, such as '{missing[0]}'{guess}")
    if unexpected:
        guess = nearest(unexpected[0], missing, 1)
        problems.append(f"{len(unexpected)} tensors have no place, such as '{unexpected[0]}'{guess}")
    if problems:
        raise CheckpointError(f"'{folder}' does not fit {model}: {'; '.join(problems)}")


def for_training(model: nn.Module, adapter: str) -> set[str]:
    """Return the names of own tensors that a file may lack because only further training needs them."""
    rules = registry.method(engine.applied(model, adapter).method).state
    names: set[str] = set()
    if rules.export is None:
        return names
    for placement in engine.placements(model, adapter):
        exported = rules.export(placement)
        own_tensors_by_name = {rules.tensor_name(placement, n): t for n, t in own_tensors(placement.adapter).items()}
        if exported and all(own_tensors_by_name.get(name) is tensor for name, tensor in exported.items()):
            names |= own_tensors_by_name.keys() - exported.keys()
    return names


def _refuse_unfit(value: _Value, folder: Path, model: str) -> None:
    """Raise a CheckpointError unless the target has the shape of the value and can represent it."""
    name, tensor, target = value.name, value.tensor, value.target
    if tensor.shape != target.shape:
        raise CheckpointError(
            f"'{folder}' does not fit {model}: '{name}' has shape {list(tensor.shape)}, the model needs "
            f"{list(target.shape)}"
        )
    floating = target.is_floating_point()
    if tensor.is_floating_point() != floating or not (floating or tensor.dtype is target.dtype):
        raise CheckpointError(f"'{folder}': '{name}' is {tensor.dtype}, the model needs {target.dtype}")
    if floating and tensor.numel():
        cast = tensor.to(target.dtype)
        # PyTorch cannot compare 8-bit floats.
        low, high = torch.aminmax(cast.float() if cast.dtype.itemsize == 1 else cast)
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            finite = bool(tensor.double().isfinite().all())
            wrong = "values too large for it" if finite else "values that are not finite"
            raise CheckpointError(f"'{folder}': '{name}' ({tensor.dtype}, here {target.dtype}) contains {wrong}")


def _base_name(rules: StateRules, entry: engine.Applied, name: str) -> str:
    """Return the name on disk of an adapter-owned base tensor."""
    path = name.rpartition(".")[0]
    saved = any(targets.is_inside(pattern, path) for pattern in getattr(entry.config, "modules_to_save", None) or ())
    key = key_of_trained(name, adapted=path in entry.paths)
    return rules.tensor_name(Train((name,), saved or name not in entry.trained), key)


def is_tied_in(model: nn.Module, method: Method, saved: Sequence[str], tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a file also has what is tied to the modules `saved`, with equal values."""
    names = targets.trained_modules(model, saved).names
    base = base_tensors(model)
    for name in tied_to(model, names):
        saved_name = next(other for other in names if base[other] is base[name])
        value = tensors.get(method.state.tensor_name(Train((name,), saved=True), name))
        saved_value = tensors.get(method.state.tensor_name(Train((saved_name,), saved=True), saved_name))
        if value is None or saved_value is None or not torch.equal(value, saved_value):
            return False
    return True


def _untie(
    tensors: dict[str, Tensor],
    expected: dict[str, Tensor],
    exported: dict[str, Tensor],
    folder: Path,
    model: str,
    partly_tied: bool,
) -> None:
    """Change `tensors` so that each tied parameter is under the one name that is expected."""
    first = {id(tensor): name for name, tensor in expected.items()}
    groups: dict[str, list[str]] = {}
    for name, tensor in exported.items():
        if id(tensor) in first:
            groups.setdefault(first[id(tensor)], []).append(name)
    for name, group in groups.items():
        present = [other for other in group if other in tensors]
        if len(group) == 1 or not present:
            continue
        lacking = next((other for other in group if other not in tensors), None)
        differing = next((other for other in present if not torch.equal(tensors[other], tensors[present[0]])), None)
        if differing is not None or (lacking is not None and not partly_tied):
            problem = f"'{lacking}' is missing next to" if differing is None else f"'{differing}' differs from"
            raise CheckpointError(
                f"'{folder}' does not fit {model}: {problem} '{present[0]}', and the two are one parameter here. It "
                "was trained with separate parameters: load it on a model that is not tied (tie_word_embeddings=False)"
            )
        value = tensors[present[0]]
        for other in present:
            del tensors[other]
        tensors[name] = value


def _take_embeddings(
    model: nn.Module, adapter: str, tensors: dict[str, Tensor], expected: dict[str, Tensor], folder: Path
) -> dict[str, Tensor]:
    """Take embedding and head that differ from the base out of `tensors`, and return them by base name."""
    entry, base = engine.applied(model, adapter), base_tensors(model)
    rules, owned = registry.method(entry.method).state, TrainedParameters.of(model, adapter)
    kept = set(chain.from_iterable(owned.kept.values())) if owned is not None else set[str]()
    values_of_base = _values_of_base(model)
    resized: dict[str, Tensor] = {}
    lacking: list[str] = []
    for name in resized_vocabulary.embedding_parameters(model):
        on_disk = _base_name(rules, entry, name)
        if on_disk in expected or name in kept:
            continue
        if on_disk not in tensors:
            lacking.append(name)
            continue
        value = tensors.pop(on_disk)
        _refuse_other_vocabulary(model, on_disk, value, base[name], folder)
        tied = next((other for other in resized if base[other] is base[name]), None)
        if tied is not None and not torch.equal(resized[tied], value):
            raise CheckpointError(
                f"'{folder}' has different values for '{tied}' and '{name}', which are one parameter here"
            )
        if tied is None and not _is_copy_of_base(values_of_base, on_disk, value):
            resized[name] = value
    written = {id(base[name]) for name in resized}
    lacking = [name for name in lacking if id(base[name]) not in written]
    if resized and lacking:
        raise CheckpointError(
            f"'{folder}' has '{next(iter(resized))}' for a resized vocabulary but not '{lacking[0]}', whose new rows "
            "were random. Ask its author to save both (in PEFT: save_embedding_layers=True)"
        )
    return resized


def _refuse_other_vocabulary(model: nn.Module, name: str, value: Tensor, weight: Tensor, folder: Path) -> None:
    """Raise a CheckpointError if the embedding or head of a file has another shape than the model's."""
    if value.shape != weight.shape:
        raise CheckpointError(
            f"'{folder}' does not fit {type(model).__name__}: '{name}' has shape {list(value.shape)}, the model "
            f"{list(weight.shape)}. Its vocabulary was resized; resize it before loading as well: "
            f"model.resize_token_embeddings({len(value)})"
        )


def _take_kept(model: nn.Module, adapter: str, tensors: dict[str, Tensor]) -> list[_Value]:
    """Take kept tensors out of `tensors` and return their values; missing ones get the base's."""
    entry, owned = engine.applied(model, adapter), TrainedParameters.of(model, adapter)
    if owned is None:
        return []
    rules, base = registry.method(entry.method).state, base_tensors(model)
    kept: list[_Value] = []
    for name, target in owned.kept_values(model):
        on_disk = [_base_name(rules, entry, slot) for slot in owned.kept[name]]
        stored = [tensors.pop(other) for other in on_disk if other in tensors]
        kept.append(_Value(on_disk[0], stored[0] if stored else base[name], target))
    return kept


def _values_of_base(model: nn.Module) -> Callable[[], Mapping[str, Tensor]]:
    """Return a function that returns the buffers and parameters of the base by name, and walks the model once."""
    return functools.cache(lambda: {**dict(model.named_buffers()), **base_tensors(model)})


def _is_copy_of_base(base: Callable[[], Mapping[str, Tensor]], name: str, tensor: Tensor) -> bool:
    """Return whether a tensor of a file repeats one of the base, as PEFT's files do with the embedding's weight."""
    base_tensor = base().get(name_in_base(name))
    if base_tensor is None or base_tensor.shape != tensor.shape:
        return False
    return torch.equal(sharded.whole(base_tensor).cpu().to(tensor.dtype), tensor)


def own_slots(model: nn.Module, adapter: str) -> set[str]:
    """Return the names of the base's tensors that `adapter` owns a copy of."""
    owned = TrainedParameters.of(model, adapter)
    return set(chain.from_iterable(owned.slots.values())) if owned is not None else set()


def names_of_base(model: nn.Module, adapter: str, names: Iterable[str]) -> dict[str, str]:
    """Return {name of a base tensor: name on disk of the adapter-owned copy}."""
    entry = engine.applied(model, adapter)
    rules = registry.method(entry.method).state
    return {name: _base_name(rules, entry, name) for name in names}
