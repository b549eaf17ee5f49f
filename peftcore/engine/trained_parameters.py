"""Adapter-owned copies of base parameters and buffers.

A slot of the model holds the adapter's tensor while the adapter is active, and the base's tensor otherwise; the other
one is stored here. Keys of the base stay the same, several adapters may own one parameter, and removing an adapter
restores the original tensor objects.

    trained   parameters of `Train` placements. Two active adapters cannot train the same parameter.
    kept      tensors that change without being trained: buffers such as the statistics of a BatchNorm, which a frozen
              model in training mode also updates. The buffers of the last active adapter are in the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftcore.engine.adaptation.adapted import Adapters
from peftcore.engine.adaptation.tensor_parallel_forward import follow_trained, trains_in_parts, unfollow_trained
from peftcore.errors import PeftcoreError
from peftcore.model.base_modules import TRAINED, base_modules, base_parameters
from peftcore.model.detecting import mark_as_loaded
from peftcore.plugin import ranks, sharded


class TrainedParameters(nn.Module):
    """Adapter-owned copies of base parameters and buffers of one adapter.

    Args:
        slots: {name of a trained parameter: all slots that share it (tied weights)}.
        kept: {name of a kept tensor: all slots that share it}.
    """

    def __init__(self, slots: dict[str, list[str]], kept: dict[str, list[str]]) -> None:
        super().__init__()
        self.slots = slots
        self.kept = kept
        self.active = False
        self.held: set[str] = set()  # names of the kept tensors that are in the model

    @staticmethod
    def attach(model: nn.Module, adapter: str, names: Iterable[str], apart: Collection[str] = ()) -> None:
        """Add inactive copies of the parameters `names`, and of the moving buffers, to `model`.

        Args:
            apart: those of `names` that are trained separately from the parameters they are tied to.
        """
        names = list(names)
        base = base_tensors(model) if names else {}
        slots: dict[str, list[str]] = {}
        owned_ids: set[int] = set()
        for name in names:
            parameter = base[name]
            if name in apart:
                slots[name] = [name]
            elif id(parameter) not in owned_ids:  # tied parameters count once
                owned_ids.add(id(parameter))
                tied = [other_name for other_name, tensor in base.items() if tensor is parameter]
                slots[name] = list(dict.fromkeys([name, *tied]))
        kept = _shared(moving_buffers(model))
        if not slots and not kept:
            return
        tensors = TrainedParameters(slots, kept)
        for name in slots:
            copy = nn.Parameter(sharded.whole(base[name]).clone())
            mark_as_loaded(copy, base[name])
            tensors._parameters[_key(name)] = copy
        for name in kept:
            tensors._buffers[_key(name)] = _slot(model, name).detach().clone()
        _add(model, adapter, tensors)
        follow_trained(tensors.owners(model))

    @staticmethod
    def keep(model: nn.Module, adapter: str, values: dict[str, Tensor]) -> None:
        """Give `adapter` its own frozen, still inactive values of base parameters.

        Args:
            values: by name in the base; one name for tied parameters.
        """
        base, tensors = base_tensors(model), TrainedParameters.of(model, adapter)
        if tensors is None:
            tensors = _add(model, adapter, TrainedParameters({}, {}))
        for name, value in values.items():
            base_tensor = base[name]
            if sharded.is_shard(base_tensor):
                raise PeftcoreError(
                    f"the adapter has its own '{name}', but the base's is sharded. Load the adapter before sharding"
                )
            tensors.kept[name] = [name, *tied_to(model, [name])]
            copy = value.to(base_tensor.device, base_tensor.dtype).clone()
            tensors._parameters[_key(name)] = nn.Parameter(copy, requires_grad=False)

    @staticmethod
    def detach(model: nn.Module, adapter: str) -> None:
        """Drop the copies of an inactive adapter."""
        adapters = cast("Adapters | None", model._modules.get(TRAINED))
        if adapters is None:
            return
        tensors = TrainedParameters.of(model, adapter)
        if tensors is not None:
            unfollow_trained(tensors.owners(model))
            for name, other_tensors in all_of(model):
                if name != adapter:
                    follow_trained(other_tensors.owners(model))
            del adapters._modules[adapter]
        if not len(adapters):
            del model._modules[TRAINED]

    @staticmethod
    def of(model: nn.Module, adapter: str) -> TrainedParameters | None:
        """Return the adapter-owned copies of `adapter`, or None."""
        adapters = model._modules.get(TRAINED)
        return None if adapters is None else cast("TrainedParameters | None", adapters._modules.get(adapter))

    def activate(self, model: nn.Module, active: bool) -> None:
        """Put the adapter's trained parameters into the model, or the base's parameters back."""
        if active == self.active:
            return
        for name, parameter in self.originals(model):
            if sharded.is_dtensor(parameter) and not _in_parts(model, name):
                sharded.refuse_sharded(model, "exchange trained parameters for those of the base")
        self._exchange_all(model, self.slots, "active", active)

    def hold(self, model: nn.Module, names: Collection[str]) -> None:
        """Put the kept tensors `names` into the model, and the base's tensors back for the others."""
        changing = {name: slots for name, slots in self.kept.items() if (name in names) != (name in self.held)}
        self._exchange_all(model, changing, "held", set(names))

    def owners(self, model: nn.Module) -> list[nn.Module]:
        """Return the modules whose parameters are trained, except for modules that have been removed."""
        modules = dict(base_modules(model))
        return [modules[path] for path in self.by_module() if path in modules]

    def by_module(self) -> dict[str, dict[str, str]]:
        """Return {path of a module: {name of a trained parameter there: its name here}}."""
        names_by_path: dict[str, dict[str, str]] = {}
        for name, slots in self.slots.items():
            for slot in slots:
                path, _, attribute = slot.rpartition(".")
                names_by_path.setdefault(path, {})[attribute] = name
        return names_by_path

    def aside(self, name: str) -> Tensor:
        """Return the tensor `name` that is not in the model: the adapter's while it is inactive, else the base's."""
        return self._aside(_key(name))

    def values(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name, the adapter's parameter) of trained parameters."""
        for name in self.slots:
            yield name, cast(nn.Parameter, _slot(model, name) if self.active else self._aside(_key(name)))

    def originals(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name, the base's parameter) of trained parameters."""
        for name in self.slots:
            yield name, cast(nn.Parameter, self._aside(_key(name)) if self.active else _slot(model, name))

    def kept_values(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, the adapter's tensor) of kept tensors."""
        for name in self.kept:
            yield name, _slot(model, name) if name in self.held else self._aside(_key(name))

    def has_moved(self, model: nn.Module) -> bool:
        """Return whether a kept tensor differs from the base's."""
        base = base_tensors(model)
        return any(not torch.equal(tensor, base[name]) for name, tensor in self.kept_values(model))

    def in_model(self, model: nn.Module) -> Iterator[tuple[list[str], Tensor, Tensor]]:
        """Yield (slots, the adapter's tensor, the base's tensor) of adapter-owned tensors that are in the model now."""
        slots_by_name = {**(self.slots if self.active else {}), **{name: self.kept[name] for name in self.held}}
        for name, slots in slots_by_name.items():
            yield slots, _slot(model, name), self._aside(_key(name))

    def changes(self, model: nn.Module) -> Iterator[tuple[str, str]]:
        """Yield (slot, how it changed) where the tensor is missing or has another shape."""
        for name, slots in {**self.slots, **self.kept}.items():
            expected_shape = list(sharded.shape_of(self._aside(_key(name))))
            for slot in slots:
                shape = _shape(model, slot)
                if shape != expected_shape:
                    yield slot, "is gone" if shape is None else f"has shape {shape}, which was {expected_shape}"

    def _aside(self, key: str) -> Tensor:
        return self._tensors_aside(key)[key]

    def _tensors_aside(self, key: str) -> dict[str, Any]:
        """Return the table that contains `key`: a plain tensor may take the place of a parameter."""
        return self._parameters if key in self._parameters else self._buffers

    def _exchange_all(self, model: nn.Module, tensors: dict[str, list[str]], attribute: str, value: Any) -> None:
        """Exchange `tensors` and set the attribute that records it; after an error do neither."""
        aside, old_value = {name: self.aside(name) for name in tensors}, getattr(self, attribute)
        try:
            for name, slots in tensors.items():
                self._exchange(model, name, slots)
            setattr(self, attribute, value)
        except BaseException:
            for name, slots in tensors.items():
                if self.aside(name) is not aside[name]:
                    self._exchange(model, name, slots)
            setattr(self, attribute, old_value)
            raise

    def _exchange(self, model: nn.Module, name: str, slots: Sequence[str]) -> None:
        key = _key(name)
        table = self._tensors_aside(key)
        aside = table[key]
        slots = [slot for slot in slots if _shape(model, slot) == list(sharded.shape_of(aside))]  # resized ones stay
        if not slots:
            return
        table[key] = _slot(model, slots[0])
        for slot in slots:
            tensors, attribute = _tensors(model, slot)
            tensors[attribute] = aside


def place_kept_tensors(model: nn.Module, active: Sequence[str]) -> None:
    """Put the kept tensors of the last of the `active` adapters into the model, or the base's tensors."""
    owner: dict[str, str] = {}
    for name in active:
        tensors = TrainedParameters.of(model, name)
        owner.update(dict.fromkeys(tensors.kept if tensors is not None else (), name))
    adapters = all_of(model)
    names_to_hold: dict[str, set[str]] = {}
    for name, adapter_tensors in adapters:
        names_to_hold[name] = {tensor_name for tensor_name in adapter_tensors.kept if owner.get(tensor_name) == name}
    # First back to the base's tensors, since two adapters may exchange one slot.
    for name, adapter_tensors in adapters:
        adapter_tensors.hold(model, adapter_tensors.held & names_to_hold[name])
    for name, adapter_tensors in adapters:
        adapter_tensors.hold(model, names_to_hold[name])


def refuse_sharded_parameters(model: nn.Module, names: Iterable[str]) -> None:
    """Raise a PeftcoreError if one of the base's parameters `names` is sharded so that it cannot be trained."""
    names = list(names)
    base = base_tensors(model) if names else {}
    by_fsdp: set[int] = set()  # ids of the modules whose parameters FSDP2 shards, and may have gathered now
    if names and ranks.count() > 1:
        by_fsdp = {id(module) for fsdp, module in sharded.modules_with_fsdp(model) if fsdp}
    for name in names:
        module = model.get_submodule(name.rpartition(".")[0])
        if id(module) in by_fsdp or (sharded.is_dtensor(sharded.original(base[name])) and not _in_parts(model, name)):
            raise PeftcoreError(
                f"'{name}' is sharded and cannot be trained from here on. Apply first, then shard; under tensor "
                "parallelism, load the model without tp_plan"
            )


def all_of(model: nn.Module) -> list[tuple[str, TrainedParameters]]:
    """Return (adapter, its owned copies) of all adapters that have some."""
    adapters = model._modules.get(TRAINED)
    if adapters is None:
        return []
    return [(name, cast(TrainedParameters, tensors)) for name, tensors in adapters._modules.items()]


def moving_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return (name, buffer) of the base's buffers that training may update; a shared one under each of its names.

    These are persistent floating-point buffers and counters. Layers that keep packed weights and scales in buffers are
    skipped.
    """
    moving: list[tuple[str, Tensor]] = []
    for path, module in base_modules(model):
        if not module._buffers:
            continue
        tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        if any(not t.is_floating_point() and t.dim() > 1 for t in tensors):
            continue
        for name, buffer in module._buffers.items():
            if buffer is None or name in module._non_persistent_buffers_set:
                continue
            if buffer.is_floating_point() or (buffer.dim() == 0 and buffer.dtype is torch.int64):
                moving.append((f"{path}.{name}" if path else name, buffer))
    return moving


@contextmanager
def unmoved_buffers(model: nn.Module) -> Iterator[None]:
    """Restore the base's moving buffers after the block."""
    values = [(buffer, buffer.clone()) for _, buffer in moving_buffers(model)]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the base's own parameters and moving buffers by name, also if an adapter's are in their place."""
    tensors = dict([*base_parameters(model), *moving_buffers(model)])
    for _, adapter_tensors in all_of(model):
        for slots, _, original in adapter_tensors.in_model(model):
            tensors.update(dict.fromkeys(slots, original))
    return tensors


def tied_to(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the names of base parameters that are tied to the parameters `names`, without `names`.

    Names of parameters that do not exist are ignored.
    """
    names = set(names)
    base = base_tensors(model) if names else {}
    tensors = {id(base[name]) for name in names if name in base}
    return [name for name, tensor in base.items() if id(tensor) in tensors and name not in names]


def enclosing_paths(model: nn.Module, paths: Iterable[str], trained: Sequence[str]) -> list[str]:
    """Return the paths of the modules whose calls take the model's lock.

    They are the model, every ancestor of the modules `paths`, the modules that own the parameters `trained`, and the
    ancestors of those.
    """
    enclosing = {"", *(name.rpartition(".")[0] for name in (*trained, *tied_to(model, trained)))}
    for path in [*paths, *enclosing]:
        while path:
            path = path.rpartition(".")[0]
            enclosing.add(path)
    return sorted(enclosing)


def modules_tied_to(model: nn.Module, path: str) -> list[str]:
    """Return the modules that share the weight of the module at `path`, unless the model's config unties them."""
    is_untied = getattr(getattr(model, "config", None), "tie_word_embeddings", True) is False
    names = [] if is_untied else tied_to(model, [f"{path}.weight"])
    return [name.rpartition(".")[0] for name in names if name.endswith(".weight")]


def _in_parts(model: nn.Module, name: str) -> bool:
    """Return whether every slot of the parameter `name` is in a layer whose tensor parallelism adapters can follow."""
    slots = [slot.rpartition(".") for slot in (name, *tied_to(model, [name]))]
    return all(trains_in_parts(model.get_submodule(path), attribute) for path, _, attribute in slots)


def _add(model: nn.Module, adapter: str, tensors: TrainedParameters) -> TrainedParameters:
    if TRAINED not in model._modules:
        model.add_module(TRAINED, Adapters().train(model.training))
    cast(Adapters, model._modules[TRAINED])._modules[adapter] = tensors.train(model.training)
    return tensors


def _shared(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, list[str]]:
    """Return {first name: all names} of each tensor."""
    first_names: dict[int, str] = {}
    all_names: dict[str, list[str]] = {}
    for name, tensor in tensors:
        all_names.setdefault(first_names.setdefault(id(tensor), name), []).append(name)
    return all_names


def _key(name: str) -> str:
    return name.replace(".", "/")  # a parameter's name must not contain a dot


def _tensors(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Return (parameters or buffers of the module with the tensor `name`, its name there)."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    return (module._parameters if attribute in module._parameters else module._buffers), attribute


def _shape(model: nn.Module, name: str) -> list[int] | None:
    try:
        slot = _slot(model, name)
    except (AttributeError, KeyError):
        return None
    return list(sharded.shape_of(slot))


def _slot(model: nn.Module, name: str) -> Tensor:
    tensors, attribute = _tensors(model, name)
    return tensors[attribute]
