"""Merge adapters into weights, by one loop for every method and weight format.

The weight is read through its format in fp32, each active adapter's pure `merged(weight, bias)` is applied, and the
result is rounded once to the stored dtype. The base's parameters are kept, not overwritten, so `unmerge` is bit exact.
Before anything is written, the outputs of each layer with the adapters and with the merged weight are compared
(merge_check.py).

The error of merging into a quantized weight is measured per layer (merged_layers.py); above a limit, merging is
refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peftcore import engine
from peftcore.engine.adaptation import adapted
from peftcore.engine.adaptation.adapted import changes_at, is_adapted
from peftcore.engine.changed_modules import module_at, parameter_shapes
from peftcore.engine.merging.merged_layers import MergedLayer, measured_error, merged_layers, refuse_unmergeable
from peftcore.engine.preflight import check_dtype
from peftcore.engine.state import Merged
from peftcore.engine.trained_parameters import TrainedParameters, tied_to
from peftcore.errors import PeftcoreError, warn, with_argument_hints
from peftcore.model.base_modules import base_parameters
from peftcore.model.detecting import mark_as_loaded
from peftcore.plugin import sharded
from peftcore.plugin.method import Model, WeightFormat


@with_argument_hints
@engine.exclusive("merge", base=True)
def merge(
    model: Model,
    *,
    undo: bool = False,
    untie: bool = False,
    dtype: torch.dtype | None = None,
    max_error: float | None = 0.1,
) -> Model:
    """Merge the active adapters into the base's weights.

    Args:
        model: the model.
        undo: keep the adapters, and a copy of each weight that changes, for `unmerge`. By default the adapters are
            removed, which leaves a plain model with new weights, as after PEFT's `merge_and_unload`.
        untie: merge into a weight that another module shares (tied embeddings) by giving the adapted module its own
            copy. By default such a weight raises an error, because merging would also change the other module.
        dtype: replace quantized weights that adapters change by dense weights of this dtype. Without `undo` the whole
            model is cast to it. By default changed weights are quantized again, see `max_error`.
        max_error: largest fraction of the adapters' change that requantizing may lose in any layer, see `merge_error`;
            None for no limit.

    Returns:
        The model.

    Raises:
        PeftcoreError: an adapter cannot be merged, or the merged weight would not compute the same; a weight is tied; a
            result is NaN or Inf; or requantizing would lose more than `max_error`. The model is left unchanged.

    Everything is checked before the first weight is written. Ctrl-C also leaves the model unchanged; without `undo`,
    only until the first layer is written. After that, an interrupted model still computes the same outputs, but other
    functions refuse it.

    Examples:
        >>> peftcore.merge(model)                       # a plain model with new weights
        >>> model.save_pretrained("merged")
    """
    _check_limit(max_error)
    check_dtype(dtype)
    state = _require_mergeable(model, "merge")
    if not state.active:
        raise PeftcoreError("no adapter is active. Activate the adapters to merge: peftcore.activate(model, [...])")
    refuse_unmergeable(model, state.active)
    for name in () if undo else state.active:
        engine.refuse_needed(state, name)
    alike = parameters_changed_alike(model, state.active)
    tied = tied_weights(model, state.active, alike)
    if tied and not untie:
        raise PeftcoreError(
            f"the weight of '{tied[0][0]}' is tied to '{tied[0][1]}', which merging would change too. Call "
            "merge(model, untie=True) to give the adapted module its own weight"
        )
    with sharded.gathered_when_read(model):
        if undo:
            return _merge(model, state, alike, tied, dtype=dtype, max_error=max_error)
        return _merge_for_good(model, state, alike, tied, dtype=dtype, max_error=max_error)


def _merge(
    model: Model,
    state: engine.State,
    alike: list[list[str]],
    tied: list[tuple[str, str]],
    *,
    dtype: torch.dtype | None,
    max_error: float | None,
) -> Model:
    """Merge the active adapters so that `unmerge` can undo it."""
    layers = list(merged_layers(model, state.active, dtype))
    losses = {layer.path: layer.lost for layer in layers if layer.lost is not None}
    _check_lost(losses, max_error)
    record, exchange, shared = Merged(state.active, lost=losses), Exchange(model), dict[str, Tensor]()
    record.unpacked = tuple(layer.unpacked for layer in layers if layer.unpacked is not None)
    try:
        _merge_trained(model, state.active, exchange)
        for layer in layers:
            _write(layer, alike, shared, exchange)
        if tied:
            record.tied = getattr(getattr(model, "config", None), "tie_word_embeddings", None)
            untie_config(model, tied)
        engine.set_active(model, (), base_exchanged=True)
        record.aside = exchange.aside
        for name in record.aside:
            tensor = get(model, name)
            record.written[name] = tensor.shape, tensor.dtype
        _update_config(model, record.unpacked)
        state.merged = record
    except BaseException:
        _restore_base(model, state.applied)
        exchange.undo()
        _restore_tied(model, record)
        engine.set_active(model, record.active, base_exchanged=True)
        _update_config(model, record.unpacked)
        raise
    return model


def _merge_for_good(
    model: Model,
    state: engine.State,
    alike: list[list[str]],
    tied: list[tuple[str, str]],
    *,
    dtype: torch.dtype | None,
    max_error: float | None,
) -> Model:
    """Merge the active adapters and remove them; the base's weights are freed one by one."""
    active = state.active
    # Every result is checked before the first one is written. To save memory no result is kept, so each layer is merged
    # twice.
    _check_lost(measured_error(model, active, dtype), max_error)
    trained_exchange, exchange = Exchange(model), Exchange(model)
    shared, unpacked, written_layers = dict[str, Tensor](), dict[str, WeightFormat](), 0
    try:
        _merge_trained(model, active, trained_exchange)
        for layer in merged_layers(model, active, dtype, checked=True):
            exchange = Exchange(model)
            _write(layer, alike, shared, exchange)
            if layer.unpacked is not None:
                unpacked[layer.path] = layer.unpacked
            # This order keeps the model's output unchanged after each layer.
            adapted.activate(model.get_submodule(layer.path), ())
            exchange, written_layers = Exchange(model), written_layers + 1
        if tied:
            untie_config(model, tied)
        _remove_merged(model, state, active, dtype, unpacked)
    except BaseException:
        exchange.undo()
        if written_layers:
            paths = {path for name in active if name in state.applied for path in state.applied[name].paths}
            state.merged = Merged(active, stopped=f"{written_layers} of {max(written_layers, len(paths))}")
        else:
            _restore_base(model, state.applied)
            trained_exchange.undo()
            engine.set_active(model, active, base_exchanged=True)
        raise
    return model


def _remove_merged(
    model: nn.Module,
    state: engine.State,
    active: tuple[str, ...],
    dtype: torch.dtype | None,
    unpacked: dict[str, WeightFormat],
) -> None:
    """Remove the merged adapters, and restore the plain class of modules whose weights were unpacked."""
    engine.set_active(model, (), base_exchanged=True)
    # Unpacking changes the shape of a weight, which is not a change by the user.
    for path, site in state.sites.items():
        site.shapes = parameter_shapes(model.get_submodule(path))
    for name in active:
        engine.remove(model, name)
    for path, weight_format in unpacked.items():
        module = model.get_submodule(path)
        if weight_format.plain is not None and not is_adapted(module):
            weight_format.plain(module)
    if unpacked:
        model.to(dtype)
    _update_config(model, unpacked.values())


def _write(layer: MergedLayer, alike: list[list[str]], shared: dict[str, Tensor], exchange: Exchange) -> None:
    """Put a merged layer's tensors into the model.

    Args:
        alike: names of tied parameters that the same adapters change; they stay tied.
        shared: {first name of a parameter in `alike`: its merged value}; updated.
    """
    first_names: dict[str, str] = {}
    for tied_names in alike:
        first_names.update(dict.fromkeys(tied_names, tied_names[0]))
    for name, tensor in layer.named_tensors():
        if name in first_names:
            tensor = shared.setdefault(first_names[name], nn.Parameter(tensor, requires_grad=False))
        exchange.put(name, tensor)


def _require_mergeable(model: nn.Module, action: str) -> engine.State:
    """Return the record of a model whose adapters can be merged; `action` names the operation in errors."""
    state = engine.require_state(model)
    engine.refuse_merged(state, action)
    engine.refuse_changed(model)
    if not engine.follows_plan(model):
        sharded.refuse_sharded(model, action)
    engine.refuse_per_sample(state, action)
    return state


@engine.exclusive("measure the error of merging")
def merge_error(model: nn.Module) -> dict[str, float]:
    """Return {path: fraction of the adapters' change that `merge` would lose} for the quantized layers.

    0 means no loss; 1 means that the error is as large as the change itself. The model is not changed.

    Examples:
        >>> errors = peftcore.merge_error(model)
        >>> max(errors, key=errors.get)    # the layer that would lose most
    """
    state = _require_mergeable(model, "measure the error of merging")
    refuse_unmergeable(model, state.active)
    with sharded.gathered_when_read(model):
        return measured_error(model, state.active, None)


@engine.exclusive("unmerge", base=True)
def unmerge(model: Model) -> Model:
    """Restore the original weights, bit for bit, and activate the merged adapters again.

    If the model has been moved or cast since, the restored weights are moved and cast too.

    Returns:
        The model.

    Raises:
        PeftcoreError: nothing is merged, or the size of a merged weight has changed. The model is left unchanged.

    Examples:
        >>> peftcore.merge(model, undo=True)
        >>> peftcore.unmerge(model)                     # restore the original weights and the active adapters
    """
    state = engine.state_of(model)
    if state is None or state.merged is None:
        raise PeftcoreError(
            "nothing to unmerge: no adapter is merged, or it was merged without undo=True. Merge with "
            "peftcore.merge(model, undo=True), or load the base again"
        )
    record = state.merged
    if record.stopped:
        raise PeftcoreError(f"cannot unmerge: {record.reason}")
    current = {name: get(model, name) for name in record.written}  # the model may have been moved or cast since
    for name, (shape, _) in record.written.items():
        tensor_now = current[name]
        if tensor_now is None or tensor_now.shape != shape:
            description = "gone" if tensor_now is None else f"of shape {list(tensor_now.shape)}"
            raise PeftcoreError(
                f"cannot restore '{name}': it is {description} now, but had shape {list(shape)} when it was merged. "
                "Undo the resize first, or keep the model merged"
            )
    exchange, devices = Exchange(model), dict[str, tuple[torch.device, torch.device]]()
    try:
        state.merged = None
        for name, tensor in record.aside.items():
            current_tensor = current[name]
            is_cast = current_tensor.dtype is not record.written[name][1] and tensor.is_floating_point()
            devices[name] = home, _ = tensor.device, current_tensor.device
            tensor.data = tensor.data.to(current_tensor.device, current_tensor.dtype if is_cast else tensor.dtype)
            exchange.put(name, tensor)
            if home != current_tensor.device:  # avoids device memory for both tensors
                current_tensor.data = current_tensor.data.to(home)
        _restore_tied(model, record)
        _update_config(model, record.unpacked)
        engine.set_active(model, record.active, base_exchanged=True)
    except BaseException:
        for name, (home, device) in devices.items():
            record.aside[name].data = record.aside[name].data.to(home)
            current[name].data = current[name].data.to(device)
        exchange.undo()
        if record.tied:
            model.config.tie_word_embeddings = False  # type: ignore[union-attr]
        _update_config(model, record.unpacked)
        engine.set_active(model, (), base_exchanged=True)
        state.merged = record
        raise
    return model


def _restore_tied(model: nn.Module, merged: Merged) -> None:
    if merged.tied is not None:
        config: Any = model.config
        config.tie_word_embeddings = merged.tied


def _update_config(model: nn.Module, formats: Iterable[WeightFormat]) -> None:
    # Formats of many layers may share one function.
    updates = {weight_format.update_config: None for weight_format in formats}
    for update in updates:
        if update is not None:
            update(model)


def _check_limit(max_error: Any) -> None:
    is_number = isinstance(max_error, (int, float)) and not isinstance(max_error, bool)
    if max_error is not None and not (is_number and max_error >= 0):
        raise PeftcoreError(
            "max_error must be a fraction of the adapters' change, at least 0, or None for no limit, found "
            f"{max_error!r}"
        )


def _check_lost(losses: dict[str, float], max_error: float | None) -> None:
    if not losses:
        return
    worst = max(losses, key=lambda path: losses[path])
    mean = sum(losses.values()) / len(losses)
    message = (
        f"requantizing {len(losses)} merged layers loses {mean:.0%} of the adapters' change on average, and at worst "
        f"{losses[worst]:.0%} ('{worst}')"
    )
    if max_error is not None and losses[worst] > max_error:
        raise PeftcoreError(
            f"{message}, but max_error={max_error:g} allows {max_error:.0%}. Nothing was changed. Merge into 16-bit "
            "weights with peftcore.merge(model, dtype=torch.bfloat16). peftcore.merge_error(model) lists the error "
            "per layer"
        )
    warn(message)


def _merge_trained(model: nn.Module, names: tuple[str, ...], exchange: Exchange) -> None:
    """Merge the adapters' copies of base tensors: write the copied values into the base."""
    for name in names:
        tensors = TrainedParameters.of(model, name)
        if tensors is None:
            continue
        values = [(tied_names, value.detach().clone()) for tied_names, value, _ in tensors.in_model(model)]
        _restore_base(model, [name])
        for tied_names, value in values:
            is_parameter = isinstance(get(model, tied_names[0]), nn.Parameter)
            tensor = nn.Parameter(value, requires_grad=False) if is_parameter else value
            for tied_name in tied_names:
                exchange.put(tied_name, tensor)


def _restore_base(model: nn.Module, names: Iterable[str]) -> None:
    for name in names:
        tensors = TrainedParameters.of(model, name)
        if tensors is not None:
            tensors.activate(model, False)
            tensors.activate_untrained(model, ())


def tied_weights(model: nn.Module, names: tuple[str, ...], alike: list[list[str]]) -> list[tuple[str, str]]:
    """Return (adapted module, another name of its parameter) for every adapted weight that is tied.

    Args:
        alike: names of tied parameters to skip.
    """
    shared = [tied_names for tied_names in _shared(model) if tied_names not in alike]
    paths = {path for name in names for path in _changed_modules(model, name)} if shared else ()
    tied = list(_trained_untied(model, names))
    for tied_names in shared:
        for tied_name in tied_names:
            path = tied_name.rpartition(".")[0]
            if path in paths:
                tied += [(path, other_name) for other_name in tied_names if other_name != tied_name]
    return tied


def _shared(model: nn.Module) -> list[list[str]]:
    """Return the names of each tied parameter."""
    by_parameter: dict[int, list[str]] = {}
    for name, parameter in base_parameters(model):
        by_parameter.setdefault(id(parameter), []).append(name)
    return [tied_names for tied_names in by_parameter.values() if len(tied_names) > 1]


def parameters_changed_alike(model: nn.Module, names: tuple[str, ...]) -> list[list[str]]:
    """Return the names of tied parameters that the same adapters change under each name; they stay tied."""
    changed_by: dict[str, list[int]] = {}
    for name in names:
        for path, adapter in engine.adapter_modules(model, name):
            changed_by.setdefault(f"{path}.weight", []).append(id(adapter))
    alike = []
    for tied_names in _shared(model):
        adapters = changed_by.get(tied_names[0], [])
        if all(changed_by.get(tied_name, []) == adapters for tied_name in tied_names):
            alike.append(tied_names)
    return alike


def _changed_modules(model: nn.Module, name: str) -> list[str]:
    """Return the paths of modules whose parameters an adapter changes."""
    paths: list[str] = []
    for path, module in engine.modules_with(model, engine.require_state(model), name):
        paths.append(path)
        for parameter_name in changes_at(module, name):
            submodule_path = parameter_name.rpartition(".")[0]
            paths.append(f"{path}.{submodule_path}".strip(".") if submodule_path else path)
    return paths


def _trained_untied(model: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield (module, another name of its parameter) for tied parameters that an adapter trains separately."""
    for name in names:
        tensors = TrainedParameters.of(model, name)
        for trained_name, tied_names in tensors.trained.items() if tensors is not None else ():
            tied = tied_to(model, tied_names)
            if tied:
                yield trained_name.rpartition(".")[0], tied[0]


def untie_config(model: nn.Module, tied: list[tuple[str, str]]) -> None:
    """Warn that the weights `tied` are no longer tied, and record it in the model's config."""
    warn(f"merge untied '{tied[0][0]}' from '{tied[0][1]}', so the model now has an additional weight")
    config: Any = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", None):
        config.tie_word_embeddings = False  # otherwise saving drops the new weight


class Exchange:
    """Exchange parameters and buffers of a model, and undo it.

    Args:
        model: the model.

    Attributes:
        aside: the original tensors, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.aside: dict[str, Tensor] = {}
        self._before: list[tuple[dict[str, Any], str, Any]] = []

    def put(self, name: str, tensor: Tensor) -> None:
        """Replace the parameter or buffer `name` by `tensor`."""
        path, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(path)
        old_tensor: Tensor = sharded.original(getattr(module, attribute))
        self.aside.setdefault(name, old_tensor)
        shard = getattr(module, "weight_shard", None) if attribute == "weight" else None
        table: dict[str, Any] = module._parameters if attribute in module._parameters else module._buffers
        if table is module._parameters:
            if shard is not None:
                if tensor.is_floating_point() and not sharded.is_dtensor(tensor):
                    tensor = shard.to_dtensor(shard.slice(tensor))
            elif sharded.is_dtensor(old_tensor) and not sharded.is_dtensor(tensor):
                tensor = sharded.sharded_like(tensor, old_tensor)
            if not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=False)
            mark_as_loaded(tensor, old_tensor)
        self._before.append((table, attribute, table.get(attribute)))
        table[attribute] = tensor

    def undo(self) -> None:
        """Restore the original tensors."""
        for table, attribute, tensor in reversed(self._before):
            table[attribute] = tensor


def get(model: nn.Module, name: str) -> Any:
    """Return a parameter or buffer by name, or None if it or its module does not exist."""
    path, _, attribute = name.rpartition(".")
    return getattr(module_at(model, path), attribute, None)
