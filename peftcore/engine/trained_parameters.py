"""Copies of base parameters and buffers that an adapter owns, and their exchange with the base's tensors.

An adapter that trains base parameters (a classifier's head, norms) trains a copy. For each such tensor there are two
values, the base's and the adapter's. One is in the model, under the base's name. The other one, its counterpart, is
stored in `TrainedParameters`, and activating the adapter exchanges the two:

    adapter     in the model           counterpart
    inactive    the base's tensor      the adapter's tensor
    active      the adapter's tensor   the base's tensor

So the base's keys never change, several adapters may have copies of one parameter, and removing an adapter restores the
original tensor objects. There are two kinds of copies:

    trained     parameters of `Train` placements. Two active adapters cannot train the same parameter.
    untrained   tensors that change without being trained: buffers such as the statistics of a BatchNorm, which a frozen
                model in training mode also updates, and frozen values from a file. If several active adapters have a
                copy, the model contains the copy of the last adapter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
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
    """The copies of base parameters and buffers that one adapter owns.

    Args:
        trained: {name of a trained parameter: all its names in the model (tied weights)}.
        untrained: {name of an untrained tensor: all its names in the model}.
    """

    def __init__(self, trained: dict[str, list[str]], untrained: dict[str, list[str]]) -> None:
        super().__init__()
        self.trained = trained
        self.untrained = untrained
        self.active = False  # whether the adapter's trained parameters are in the model
        self.active_untrained: set[str] = set()  # names of the adapter's untrained tensors that are in the model

    @staticmethod
    def attach(model: nn.Module, adapter: str, names: Iterable[str], untied: Collection[str] = ()) -> None:
        """Add inactive copies of the parameters `names`, and of the buffers that training updates, to `model`.

        Args:
            model: the model.
            adapter: name of the adapter that owns the copies.
            names: names of base parameters.
            untied: names among `names` to train separately from the parameters that they are tied to.
        """
        names = list(names)
        base = base_tensors(model) if names else {}
        trained = _group_tied_names(base, names, untied)
        untrained = _names_by_tensor(updated_buffers(model))
        if not trained and not untrained:
            return
        copies = TrainedParameters(trained, untrained)
        for name in trained:
            copy = nn.Parameter(sharded.whole(base[name]).clone())
            mark_as_loaded(copy, base[name])
            copies._parameters[_key(name)] = copy
        for name in untrained:
            copies._buffers[_key(name)] = _tensor_at(model, name).detach().clone()
        _add(model, adapter, copies)
        follow_trained(copies.owners(model))

    @staticmethod
    def add_untrained(model: nn.Module, adapter: str, values: dict[str, Tensor]) -> None:
        """Give `adapter` untrained values for base parameters, as inactive copies.

        Args:
            model: the model.
            adapter: name of the adapter that owns the copies.
            values: {name in the base: value}; one name is enough for tied parameters.
        """
        base, copies = base_tensors(model), TrainedParameters.of(model, adapter)
        if copies is None:
            copies = _add(model, adapter, TrainedParameters({}, {}))
        for name, value in values.items():
            base_tensor = base[name]
            if sharded.is_shard(base_tensor):
                raise PeftcoreError(
                    f"the adapter has its own copy of '{name}', but the base's '{name}' is already sharded. Load the "
                    "adapter before sharding"
                )
            copies.untrained[name] = [name, *tied_to(model, [name])]
            copy = value.to(base_tensor.device, base_tensor.dtype).clone()
            copies._parameters[_key(name)] = nn.Parameter(copy, requires_grad=False)

    @staticmethod
    def detach(model: nn.Module, adapter: str) -> None:
        """Drop the copies of an inactive adapter."""
        adapters = cast("Adapters | None", model._modules.get(TRAINED))
        if adapters is None:
            return
        copies = TrainedParameters.of(model, adapter)
        if copies is not None:
            unfollow_trained(copies.owners(model))
            # A module whose parameters another adapter trains must go on following tensor parallelism.
            for name, other_copies in all_of(model):
                if name != adapter:
                    follow_trained(other_copies.owners(model))
            del adapters._modules[adapter]
        if not len(adapters):
            del model._modules[TRAINED]

    @staticmethod
    def of(model: nn.Module, adapter: str) -> TrainedParameters | None:
        """Return the copies that `adapter` owns, or None."""
        adapters = model._modules.get(TRAINED)
        return None if adapters is None else cast("TrainedParameters | None", adapters._modules.get(adapter))

    def activate(self, model: nn.Module, active: bool) -> None:
        """Put the adapter's trained parameters into the model; if `active` is False, put the base's back."""
        if active == self.active:
            return
        for name, parameter in self.originals(model):
            if sharded.is_dtensor(parameter) and not _follows_parallelism(model, name):
                sharded.refuse_sharded(model, "exchange trained parameters for those of the base")
        self._exchange_all(model, self.trained, "active", active)

    def activate_untrained(self, model: nn.Module, names: Collection[str]) -> None:
        """Put the adapter's untrained tensors `names` into the model, and the base's tensors back for its others."""
        changing = {
            name: tied_names
            for name, tied_names in self.untrained.items()
            if (name in names) != (name in self.active_untrained)
        }
        self._exchange_all(model, changing, "active_untrained", set(names))

    def owners(self, model: nn.Module) -> list[nn.Module]:
        """Return the modules whose parameters are trained, skipping modules that have been removed."""
        modules = dict(base_modules(model))
        return [modules[path] for path in self.by_module() if path in modules]

    def by_module(self) -> dict[str, dict[str, str]]:
        """Return {path of a module: {name of its parameter: key of `trained`}}."""
        names_by_path: dict[str, dict[str, str]] = {}
        for name, tied_names in self.trained.items():
            for tied_name in tied_names:
                path, _, attribute = tied_name.rpartition(".")
                names_by_path.setdefault(path, {})[attribute] = name
        return names_by_path

    def counterpart(self, name: str) -> Tensor:
        """Return the stored counterpart of a tensor: the adapter's while inactive, the base's while active."""
        return self._counterpart(_key(name))

    def values(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name, the adapter's parameter) for the trained parameters."""
        for name in self.trained:
            yield name, cast(nn.Parameter, _tensor_at(model, name) if self.active else self._counterpart(_key(name)))

    def originals(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name, the base's parameter) for the trained parameters."""
        for name in self.trained:
            yield name, cast(nn.Parameter, self._counterpart(_key(name)) if self.active else _tensor_at(model, name))

    def untrained_values(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, the adapter's tensor) for the untrained tensors."""
        for name in self.untrained:
            yield name, _tensor_at(model, name) if name in self.active_untrained else self._counterpart(_key(name))

    def differs_from_base(self, model: nn.Module) -> bool:
        """Return whether an untrained tensor differs from the base's."""
        base = base_tensors(model)
        return any(not torch.equal(tensor, base[name]) for name, tensor in self.untrained_values(model))

    def in_model(self, model: nn.Module) -> Iterator[tuple[list[str], Tensor, Tensor]]:
        """Yield (names, the adapter's tensor, the base's tensor) for the adapter's tensors that are in the model."""
        names_in_model = {name: self.untrained[name] for name in self.active_untrained}
        if self.active:
            names_in_model = {**self.trained, **names_in_model}
        for name, tied_names in names_in_model.items():
            yield tied_names, _tensor_at(model, name), self._counterpart(_key(name))

    def changes(self, model: nn.Module) -> Iterator[tuple[str, str]]:
        """Yield (name, description) for tensors that are missing from the model or have another shape."""
        for name, tied_names in {**self.trained, **self.untrained}.items():
            expected_shape = list(sharded.shape_of(self._counterpart(_key(name))))
            for tied_name in tied_names:
                shape = _shape_at(model, tied_name)
                if shape != expected_shape:
                    description = "is gone" if shape is None else f"has shape {shape}, which was {expected_shape}"
                    yield tied_name, description

    def _counterpart(self, key: str) -> Tensor:
        return self._storage_of(key)[key]

    def _storage_of(self, key: str) -> dict[str, Any]:
        """Return the dictionary that stores `key`; a plain tensor may take the place of a parameter in it."""
        return self._parameters if key in self._parameters else self._buffers

    def _exchange_all(self, model: nn.Module, tensors: dict[str, list[str]], attribute: str, value: Any) -> None:
        """Exchange `tensors` with their counterparts and set `attribute`; after an error, undo all exchanges."""
        counterparts = {name: self.counterpart(name) for name in tensors}
        old_value = getattr(self, attribute)
        try:
            for name, tied_names in tensors.items():
                self._exchange(model, name, tied_names)
            setattr(self, attribute, value)
        except BaseException:
            for name, tied_names in tensors.items():
                is_exchanged = self.counterpart(name) is not counterparts[name]
                if is_exchanged:
                    self._exchange(model, name, tied_names)
            setattr(self, attribute, old_value)
            raise

    def _exchange(self, model: nn.Module, name: str, tied_names: Sequence[str]) -> None:
        """Exchange one tensor of the model with its counterpart."""
        key = _key(name)
        storage = self._storage_of(key)
        counterpart = storage[key]
        expected_shape = list(sharded.shape_of(counterpart))
        fitting_names = [tied_name for tied_name in tied_names if _shape_at(model, tied_name) == expected_shape]
        if not fitting_names:  # the model's tensors were resized
            return
        storage[key] = _tensor_at(model, fitting_names[0])
        for tied_name in fitting_names:
            tensors, attribute = _dictionary_of(model, tied_name)
            tensors[attribute] = counterpart


def place_untrained_tensors(model: nn.Module, active: Sequence[str]) -> None:
    """Put untrained tensors of the `active` adapters into the model, and the base's tensors back for all others.

    If several active adapters have a copy of a tensor, the copy of the last one is used.
    """
    owner: dict[str, str] = {}  # {name of a tensor: the adapter whose copy to use}
    for name in active:
        copies = TrainedParameters.of(model, name)
        if copies is not None:
            owner.update(dict.fromkeys(copies.untrained, name))
    adapters = all_of(model)
    names_to_place: dict[str, set[str]] = {name: set() for name, _ in adapters}
    for tensor_name, name in owner.items():
        names_to_place[name].add(tensor_name)
    # First put the base's tensors back: two adapters may have copies of the same tensor, and the second exchange would
    # otherwise store the first adapter's copy as the base's.
    for name, copies in adapters:
        copies.activate_untrained(model, copies.active_untrained & names_to_place[name])
    for name, copies in adapters:
        copies.activate_untrained(model, names_to_place[name])


def refuse_sharded_parameters(model: nn.Module, names: Iterable[str]) -> None:
    """Raise a PeftcoreError if one of the base parameters `names` is sharded in a way that prevents training it."""
    names = list(names)
    base = base_tensors(model) if names else {}
    fsdp_modules: set[int] = set()  # ids of modules under FSDP2, whose parameters may be gathered right now
    if names and ranks.count() > 1:
        fsdp_modules = {id(module) for fsdp, module in sharded.modules_with_fsdp(model) if fsdp}
    for name in names:
        module = model.get_submodule(name.rpartition(".")[0])
        is_dtensor = sharded.is_dtensor(sharded.original(base[name]))
        if id(module) in fsdp_modules or (is_dtensor and not _follows_parallelism(model, name)):
            raise PeftcoreError(
                f"'{name}' is already sharded and cannot be trained. Apply the adapter before sharding; under tensor "
                "parallelism, load the model without tp_plan"
            )


def all_of(model: nn.Module) -> list[tuple[str, TrainedParameters]]:
    """Return (adapter, its copies) for each adapter that owns copies of base tensors."""
    adapters = model._modules.get(TRAINED)
    if adapters is None:
        return []
    return [(name, cast(TrainedParameters, tensors)) for name, tensors in adapters._modules.items()]


def updated_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return (name, buffer) of base buffers that training may update; a shared buffer appears under each name.

    These are persistent floating-point buffers and counters. Layers that keep packed weights and scales in buffers are
    skipped.
    """
    buffers: list[tuple[str, Tensor]] = []
    for path, module in base_modules(model):
        if not module._buffers:
            continue
        tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        has_packed_weight = any(not t.is_floating_point() and t.dim() > 1 for t in tensors)
        if has_packed_weight:
            continue
        for name, buffer in module._buffers.items():
            if buffer is None or name in module._non_persistent_buffers_set:
                continue
            is_counter = buffer.dim() == 0 and buffer.dtype is torch.int64
            if buffer.is_floating_point() or is_counter:
                buffers.append((f"{path}.{name}" if path else name, buffer))
    return buffers


@contextmanager
def restored_buffers(model: nn.Module) -> Iterator[None]:
    """At the end of the block, restore the buffers that training updates."""
    values = [(buffer, buffer.clone()) for _, buffer in updated_buffers(model)]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return {name: the base's tensor} for parameters and updated buffers, even while adapters replace them."""
    tensors = dict([*base_parameters(model), *updated_buffers(model)])
    for _, copies in all_of(model):
        for names, _, original in copies.in_model(model):
            tensors.update(dict.fromkeys(names, original))
    return tensors


def tied_to(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the names of base parameters that are tied to the parameters `names`, without `names`.

    Names of parameters that do not exist are ignored.
    """
    names = set(names)
    base = base_tensors(model) if names else {}
    tensor_ids = {id(base[name]) for name in names if name in base}
    return [name for name, tensor in base.items() if id(tensor) in tensor_ids and name not in names]


def enclosing_paths(model: nn.Module, paths: Iterable[str], trained: Sequence[str]) -> list[str]:
    """Return the paths of the modules whose calls take the model's lock.

    They are the model, every ancestor of the modules at `paths`, and the modules that own the parameters `trained` with
    all their ancestors.
    """
    owners = {name.rpartition(".")[0] for name in (*trained, *tied_to(model, trained))}
    enclosing = {"", *owners}
    for path in [*paths, *owners]:
        while path:
            path = path.rpartition(".")[0]
            enclosing.add(path)
    return sorted(enclosing)


def modules_tied_to(model: nn.Module, path: str) -> list[str]:
    """Return the modules that share the weight of the module at `path`, unless the model's config unties them."""
    is_untied = getattr(getattr(model, "config", None), "tie_word_embeddings", True) is False
    names = [] if is_untied else tied_to(model, [f"{path}.weight"])
    return [name.rpartition(".")[0] for name in names if name.endswith(".weight")]


def _follows_parallelism(model: nn.Module, name: str) -> bool:
    """Return whether all modules with the parameter `name` have tensor parallelism that adapters can follow."""
    for tied_name in (name, *tied_to(model, [name])):
        path, _, attribute = tied_name.rpartition(".")
        if not trains_in_parts(model.get_submodule(path), attribute):
            return False
    return True


def _add(model: nn.Module, adapter: str, copies: TrainedParameters) -> TrainedParameters:
    """Store the copies that `adapter` owns in `model`, and return them."""
    if TRAINED not in model._modules:
        model.add_module(TRAINED, Adapters().train(model.training))
    cast(Adapters, model._modules[TRAINED])._modules[adapter] = copies.train(model.training)
    return copies


def _group_tied_names(
    base: Mapping[str, Tensor], names: Iterable[str], untied: Collection[str]
) -> dict[str, list[str]]:
    """Return {first name in `names`: all names in the base} for each distinct parameter.

    Args:
        untied: names that stand alone, even if their parameter is tied to others.
    """
    groups: dict[str, list[str]] = {}
    grouped_ids: set[int] = set()
    for name in names:
        parameter = base[name]
        if name in untied:
            groups[name] = [name]
        elif id(parameter) not in grouped_ids:
            grouped_ids.add(id(parameter))
            tied_names = [other_name for other_name, tensor in base.items() if tensor is parameter]
            groups[name] = list(dict.fromkeys([name, *tied_names]))
    return groups


def _names_by_tensor(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, list[str]]:
    """Return {first name: all names} for each distinct tensor."""
    first_names: dict[int, str] = {}
    all_names: dict[str, list[str]] = {}
    for name, tensor in tensors:
        all_names.setdefault(first_names.setdefault(id(tensor), name), []).append(name)
    return all_names


def _key(name: str) -> str:
    return name.replace(".", "/")  # PyTorch does not allow dots in the name of a parameter


def _dictionary_of(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Return (the module's dictionary of parameters or buffers that contains `name`, the name in it)."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    return (module._parameters if attribute in module._parameters else module._buffers), attribute


def _shape_at(model: nn.Module, name: str) -> list[int] | None:
    """Return the shape of a tensor of the model, or None if it does not exist."""
    try:
        tensor = _tensor_at(model, name)
    except (AttributeError, KeyError):
        return None
    return list(sharded.shape_of(tensor))


def _tensor_at(model: nn.Module, name: str) -> Tensor:
    tensors, attribute = _dictionary_of(model, name)
    return tensors[attribute]
