"""Tensors of an applied adapter by their names on disk: which to save, and how to fill them from a file.

own        the tensors that the adapter trains, once each
exported   tensors for other libraries: other forms of the own tensors, and every name of a tied parameter
kept       buffers that training has changed, and all buffers in modules that are trained as a whole
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
    """Return the own and exported tensors of an applied adapter by their names on disk.

    Args:
        model: the model.
        adapter: name of the adapter.
        own: include the own tensors of modules that also have exported ones.
        exported: include the exported tensors.
    """
    entry = engine.applied(model, adapter)
    rules = registry.method(entry.method).state
    tensors: dict[str, Tensor] = {}
    written_ids: set[int] = set()  # the first adapter writes the tensors of a module that several share

    def add(named_tensors: Iterable[tuple[str, Tensor]], function: str) -> None:
        for on_disk, tensor in named_tensors:
            if tensors.setdefault(on_disk, tensor) is not tensor:
                raise PeftcoreError(
                    f"{entry.method} gives two tensors the name '{on_disk}'. {function} must return unique names"
                )

    with registry.naming(entry.method, "tensor_name"):
        for placement in engine.placements(model, adapter):
            exported_tensors: Mapping[str, Tensor] = {}
            if exported and rules.export is not None:
                with registry.naming(entry.method, "export"), sharded.gathered_parameters(placement.adapter):
                    exported_tensors = rules.export(placement)
                add(exported_tensors.items(), "export")
            if own or not exported_tensors:
                named = []
                for name, tensor in own_tensors(placement.adapter).items():
                    if id(tensor) not in written_ids:
                        written_ids.add(id(tensor))
                        named.append((rules.tensor_name(placement, name), tensor))
                add(named, "tensor_name")
    trained_parameters = TrainedParameters.of(model, adapter)
    if trained_parameters is not None:
        for name, parameter in trained_parameters.values(model):
            for slot in trained_parameters.trained[name] if exported else (name,):
                add([(_base_name(rules, entry, slot), parameter)], "tensor_name")
    return tensors


def kept_on_disk(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Return the untrained tensors to write: values that another load of the base would not have.

    These are tensors that differ from the base, buffers in fully trained modules, and the embedding of a resized
    vocabulary.
    """
    entry = engine.applied(model, adapter)
    rules, base = registry.method(entry.method).state, base_tensors(model)
    trained_parameters = TrainedParameters.of(model, adapter)
    modules_to_save = getattr(entry.config, "modules_to_save", None) or ()
    buffer_names: set[str] = set()
    for path, module in base_modules(model) if modules_to_save else ():
        if path and any(targets.is_inside(pattern, path) for pattern in modules_to_save):
            persistent = module._buffers.keys() - module._non_persistent_buffers_set
            buffer_names.update(f"{path}.{name}" for name in persistent if module._buffers[name] is not None)
    buffers = {name: model.get_buffer(name) for name in sorted(buffer_names)}
    owned_names = trained_names(model, adapter)
    buffers.update(
        {name: base[name] for name in resized_vocabulary.resized_parameters(model) if name not in owned_names}
    )
    if trained_parameters is not None:
        for name, tensor in trained_parameters.untrained_values(model):
            if name in buffers or not torch.equal(tensor, base[name]):
                buffers.update(dict.fromkeys(trained_parameters.untrained[name], tensor))
    return {_base_name(rules, entry, name): tensor for name, tensor in buffers.items()}


def grown_buffers(model: nn.Module, adapter: str, tensors: Mapping[str, Tensor]) -> list[tuple[nn.Module, str, Tensor]]:
    """Return (module, name, empty buffer of the new shape) for each buffer whose shape differs in `tensors`."""
    rules, grown = registry.method(engine.applied(model, adapter).method).state, []
    for placement in engine.placements(model, adapter):
        for name, tensor in own_tensors(placement.adapter).items():
            stored = tensors.get(rules.tensor_name(placement, name))
            if stored is not None and stored.shape != tensor.shape and not isinstance(tensor, nn.Parameter):
                path, _, attribute = name.rpartition(".")
                grown.append((placement.adapter.get_submodule(path), attribute, tensor.new_empty(stored.shape)))
    return grown


def fill(model: nn.Module, adapter: str, tensors: dict[str, Tensor], folder: Path, *, partly_tied: bool = True) -> None:
    """Copy `tensors` into the applied `adapter`.

    Args:
        model: the model.
        adapter: name of the adapter.
        tensors: tensors by their names on disk.
        folder: the folder of the tensors, for messages.
        partly_tied: the file may have a tied parameter under only one of its names.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape, or its values cannot be represented.
    """
    sharded.reshard(model)
    tensors = dict(tensors)
    expected_tensors = exported_tensors = tensors_on_disk(model, adapter)
    if registry.method(engine.applied(model, adapter).method).state.export is not None or trained_names(model, adapter):
        exported_tensors = tensors_on_disk(model, adapter, exported=True)  # equal to the adapter's own tensors
        _untie(tensors, expected_tensors, exported_tensors, folder, type(model).__name__, partly_tied)
    values = _take_kept(model, adapter, tensors)
    embeddings: dict[str, Tensor] = {}
    if tensors.keys() - expected_tensors.keys():
        embeddings = _take_embeddings(model, adapter, tensors, expected_tensors, folder)
        _drop_repeats(model, tensors, expected_tensors, exported_tensors)
    missing = sorted(expected_tensors.keys() - tensors.keys() - for_training(model, adapter))
    _refuse_other_names(missing, sorted(tensors.keys() - expected_tensors.keys()), folder, type(model).__name__)
    values += [_Value(name, tensor, expected_tensors[name]) for name, tensor in tensors.items()]
    for value in values:
        _refuse_unfit(value, folder, type(model).__name__)
    with torch.no_grad():
        for value in values:
            sharded.fill(value.target, value.tensor)
    if embeddings:
        state = engine.require_state(model)
        TrainedParameters.add_untrained(model, adapter, embeddings)
        engine.set_active(model, state.active, state.samples)


@dataclass(frozen=True)
class _Value:
    """A tensor of a file, its name in the file, and the tensor that gets its values."""

    name: str
    tensor: Tensor
    target: Tensor


def _drop_repeats(
    model: nn.Module, tensors: dict[str, Tensor], expected: Mapping[str, Tensor], exported: Mapping[str, Tensor]
) -> None:
    """Delete redundant entries of `tensors`: exported forms of own tensors, and copies of the base's tensors."""
    base = _values_of_base(model)
    for name in [name for name in tensors if name not in expected]:
        if name in exported or _is_copy_of_base(base, name, tensors[name]):
            del tensors[name]


def _refuse_other_names(missing: Sequence[str], unexpected: Sequence[str], folder: Path, model: str) -> None:
    """Raise a CheckpointError if tensors are missing or unexpected. The error suggests the nearest names."""
    problems: list[str] = []
    if missing:
        guess = nearest(missing[0], unexpected, 1)
        problems.append(f"{len(missing)} tensors are missing, such as '{missing[0]}'{guess}")
    if unexpected:
        guess = nearest(unexpected[0], missing, 1)
        problems.append(f"{len(unexpected)} tensors are unexpected, such as '{unexpected[0]}'{guess}")
    if problems:
        raise CheckpointError(f"'{folder}' does not fit {model}: {'; '.join(problems)}")


def for_training(model: nn.Module, adapter: str) -> set[str]:
    """Return the names of own tensors that a file may lack, because they are only needed for further training."""
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
            f"'{folder}' does not fit {model}: '{name}' has shape {list(tensor.shape)}, but the model needs "
            f"{list(target.shape)}"
        )
    floating = target.is_floating_point()
    if tensor.is_floating_point() != floating or not (floating or tensor.dtype is target.dtype):
        raise CheckpointError(
            f"'{folder}' does not fit {model}: '{name}' is {tensor.dtype}, but the model needs {target.dtype}"
        )
    if floating and tensor.numel():
        cast = tensor.to(target.dtype)
        # PyTorch cannot compare 8-bit floats.
        low, high = torch.aminmax(cast.float() if cast.dtype.itemsize == 1 else cast)
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            finite = bool(tensor.double().isfinite().all())
            problem = "values that are too large for it" if finite else "values that are not finite"
            raise CheckpointError(
                f"'{folder}' cannot be loaded: '{name}' ({tensor.dtype}; {target.dtype} in the model) contains "
                f"{problem}"
            )


def _base_name(rules: StateRules, entry: engine.Applied, name: str) -> str:
    """Return the name on disk of a base tensor that the adapter owns."""
    path = name.rpartition(".")[0]
    is_saved = any(targets.is_inside(pattern, path) for pattern in getattr(entry.config, "modules_to_save", None) or ())
    key = key_of_trained(name, adapted=path in entry.paths)
    return rules.tensor_name(Train((name,), is_saved or name not in entry.trained), key)


def is_tied_in(model: nn.Module, method: Method, saved: Sequence[str], tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a file has equal values for the modules `saved` and for the parameters tied to them."""
    names = targets.trained_modules(model, saved).names
    base = base_tensors(model)
    for name in tied_to(model, names):
        saved_name = next(candidate for candidate in names if base[candidate] is base[name])
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
    """Reduce the names of each tied parameter in `tensors` to the expected one.

    Raises:
        CheckpointError: the names have different values, or one of them is missing.
    """
    first_names = {id(tensor): name for name, tensor in expected.items()}
    groups: dict[str, list[str]] = {}
    for name, tensor in exported.items():
        if id(tensor) in first_names:
            groups.setdefault(first_names[id(tensor)], []).append(name)
    for name, group in groups.items():
        present = [alias for alias in group if alias in tensors]
        if len(group) == 1 or not present:
            continue
        lacking = next((alias for alias in group if alias not in tensors), None)
        differing = next((alias for alias in present if not torch.equal(tensors[alias], tensors[present[0]])), None)
        if differing is not None or (lacking is not None and not partly_tied):
            problem = f"the file lacks '{lacking}' but has" if differing is None else f"'{differing}' differs from"
            raise CheckpointError(
                f"'{folder}' does not fit {model}: {problem} '{present[0]}', but this model ties the two. The adapter "
                "was trained with separate parameters: load it on an untied model (tie_word_embeddings=False)"
            )
        value = tensors[present[0]]
        for alias in present:
            del tensors[alias]
        tensors[name] = value


def _take_embeddings(
    model: nn.Module, adapter: str, tensors: dict[str, Tensor], expected: dict[str, Tensor], folder: Path
) -> dict[str, Tensor]:
    """Remove the embedding and the head from `tensors`, and return those that differ from the base, by base name."""
    entry, base = engine.applied(model, adapter), base_tensors(model)
    rules, trained_parameters = registry.method(entry.method).state, TrainedParameters.of(model, adapter)
    untrained_names = (
        set(chain.from_iterable(trained_parameters.untrained.values()))
        if trained_parameters is not None
        else set[str]()
    )
    values_of_base = _values_of_base(model)
    embeddings: dict[str, Tensor] = {}
    lacking: list[str] = []
    for name in resized_vocabulary.embedding_parameters(model):
        on_disk = _base_name(rules, entry, name)
        if on_disk in expected or name in untrained_names:
            continue
        if on_disk not in tensors:
            lacking.append(name)
            continue
        value = tensors.pop(on_disk)
        _refuse_other_vocabulary(model, on_disk, value, base[name], folder)
        tied = next((other_name for other_name in embeddings if base[other_name] is base[name]), None)
        if tied is not None and not torch.equal(embeddings[tied], value):
            raise CheckpointError(
                f"'{folder}' has different values for '{tied}' and '{name}', but this model ties the two. Load the "
                "adapter on an untied model (tie_word_embeddings=False)"
            )
        if tied is None and not _is_copy_of_base(values_of_base, on_disk, value):
            embeddings[name] = value
    written_ids = {id(base[name]) for name in embeddings}
    lacking = [name for name in lacking if id(base[name]) not in written_ids]
    if embeddings and lacking:
        raise CheckpointError(
            f"'{folder}' was trained with a resized vocabulary and has '{next(iter(embeddings))}', but '{lacking[0]}' "
            "is missing, so its new rows would be random. Ask the author to save both tensors (in PEFT: "
            "save_embedding_layers=True)"
        )
    return embeddings


def _refuse_other_vocabulary(model: nn.Module, name: str, value: Tensor, weight: Tensor, folder: Path) -> None:
    """Raise a CheckpointError if the shape of a file's embedding or head differs from the model's."""
    if value.shape != weight.shape:
        raise CheckpointError(
            f"'{folder}' does not fit {type(model).__name__}: '{name}' has shape {list(value.shape)}, but "
            f"{list(weight.shape)} in the model. The adapter was trained with a resized vocabulary, so resize the "
            f"model before loading: model.resize_token_embeddings({len(value)})"
        )


def _take_kept(model: nn.Module, adapter: str, tensors: dict[str, Tensor]) -> list[_Value]:
    """Remove untrained tensors from `tensors`, and return their values. A missing tensor gets the base's value."""
    entry, trained_parameters = engine.applied(model, adapter), TrainedParameters.of(model, adapter)
    if trained_parameters is None:
        return []
    rules, base = registry.method(entry.method).state, base_tensors(model)
    values: list[_Value] = []
    for name, target in trained_parameters.untrained_values(model):
        on_disk = [_base_name(rules, entry, slot) for slot in trained_parameters.untrained[name]]
        stored_tensors = [tensors.pop(other_name) for other_name in on_disk if other_name in tensors]
        values.append(_Value(on_disk[0], stored_tensors[0] if stored_tensors else base[name], target))
    return values


def _values_of_base(model: nn.Module) -> Callable[[], Mapping[str, Tensor]]:
    """Return a cached function that returns the base's buffers and parameters by name."""
    return functools.cache(lambda: {**dict(model.named_buffers()), **base_tensors(model)})


def _is_copy_of_base(base: Callable[[], Mapping[str, Tensor]], name: str, tensor: Tensor) -> bool:
    """Return whether a file's tensor is a copy of the base's. PEFT's files contain the embedding's weight."""
    base_tensor = base().get(name_in_base(name))
    if base_tensor is None or base_tensor.shape != tensor.shape:
        return False
    return torch.equal(sharded.whole(base_tensor).cpu().to(tensor.dtype), tensor)


def trained_names(model: nn.Module, adapter: str) -> set[str]:
    """Return the names of the base tensors that `adapter` owns a copy of."""
    trained_parameters = TrainedParameters.of(model, adapter)
    return set(chain.from_iterable(trained_parameters.trained.values())) if trained_parameters is not None else set()


def names_of_base(model: nn.Module, adapter: str, names: Iterable[str]) -> dict[str, str]:
    """Return {name of a base tensor: name on disk of the adapter's copy}."""
    entry = engine.applied(model, adapter)
    rules = registry.method(entry.method).state
    return {name: _base_name(rules, entry, name) for name in names}
