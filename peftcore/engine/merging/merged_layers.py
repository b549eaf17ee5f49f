"""Compute the merged parameters of each adapted module and check them; `merge.py` writes them into the model.

`merged_layers` is the main entry. For each module, `merged_copies` makes two shallow float32 copies, one with the
base's parameters and one with the merged parameters. Adapters that change single parameters (`OnWeight`) are merged
first, because the module's own forward reads these parameters. Then `merged` of each adapter around or after the module
is applied, in order of activation. `merge_check.py` compares the outputs of the two copies.

If the weight is quantized, requantizing loses a part of the change, which is measured in Frobenius norms:

    error = |stored weight - merged weight| / |merged weight - original weight|
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftcore import engine
from peftcore.engine.adaptation.adapted import adapters_at
from peftcore.engine.merging.merge_check import evaluated, put, refuse_inexact
from peftcore.engine.trained_parameters import TrainedParameters
from peftcore.errors import PeftcoreError
from peftcore.model import describe_reader, external_reads
from peftcore.model.experts import experts_layout
from peftcore.model.weight_formats import DENSE, find_weight_format, quantized_format, weight_format
from peftcore.plugin.link import Link
from peftcore.plugin.method import WeightFormat
from peftcore.plugin.registry import registry


@dataclass
class MergedLayer:
    """Merged parameters of one module, not yet written into the model.

    Args:
        path: path of the module.
        tensors: tensors to store, by name in the module.
        lost: fraction of the change that requantizing loses; None if nothing is quantized again.
        unpacked: format of the quantized weight that a dense weight replaces, or None.
    """

    path: str
    tensors: dict[str, Tensor]
    lost: float | None
    unpacked: WeightFormat | None = None

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        """Return (full name, tensor) for each tensor to store."""
        prefix = f"{self.path}." if self.path else ""
        return [(prefix + attribute, tensor) for attribute, tensor in self.tensors.items()]


@dataclass
class MergedCopies:
    """Two float32 copies of a module. Quantized parameters are dense in both copies.

    Args:
        base: copy with the base's parameters and the adapters.
        merged: copy with the merged parameters and without adapters.
        changed: names of the parameters that may differ (a dictionary, to keep their order).
        packed: {name of a parameter that is quantized in the module: its format}.
        weight, bias: weight and bias that `merged` of the adapters returned, as `WeightFormat.read` arranges them. None
            if no adapter has `merged`; `bias` is also None if it did not change.
    """

    base: nn.Module
    merged: nn.Module
    changed: dict[str, None] = field(default_factory=dict)
    packed: dict[str, WeightFormat] = field(default_factory=dict)
    weight: Tensor | None = None
    bias: Tensor | None = None

    def differs(self) -> bool:
        """Return whether an adapter changes anything."""
        return any(not torch.equal(_get(self.base, name), _get(self.merged, name)) for name in self.changed)


def refuse_unmergeable(model: nn.Module, names: tuple[str, ...]) -> None:
    """Raise a PeftcoreError if one of the adapters does more than change weights."""
    state = engine.require_state(model)
    unmergeable_paths: dict[str, str] = {}
    for name in names:
        for path, module in engine.modules_with(model, state, name):
            if not is_mergeable(module, name):
                unmergeable_paths[name] = path
    if not unmergeable_paths:
        return
    method = {name: engine.applied(model, name).method for name in names}
    mergeable = [name for name in names if name not in unmergeable_paths]
    name, path = next(iter(unmergeable_paths.items()))
    hint = "No active adapter can be merged"
    if mergeable:
        listing = ", ".join(f"{other_name} ({method[other_name]})" for other_name in mergeable)
        hint = f"To merge only the others ({listing}), first call peftcore.activate(model, {mergeable})"
    raise PeftcoreError(
        f"adapter '{name}' ({method[name]}) cannot be merged, because it does more than change weights at '{path}'. "
        f"{hint}"
    )


def is_mergeable(module: nn.Module, name: str) -> bool:
    """Return whether the adapter `name` of a module only changes weights."""
    adapters = adapters_at(module)
    return adapters.links.get(name, Link).is_mergeable(adapters[name])


def can_merge(model: nn.Module) -> bool:
    """Return whether `merge` supports all active adapters, because they only change weights.

    Raises:
        PeftcoreError: the model has no adapters.

    Examples:
        >>> if peftcore.can_merge(model):
        ...     peftcore.merge(model)
    """
    state = engine.require_state(model)
    return all(
        is_mergeable(module, name) for name in state.active for _, module in engine.modules_with(model, state, name)
    )


def merged_layers(
    model: nn.Module,
    names: tuple[str, ...],
    dtype: torch.dtype | None,
    *,
    checked: bool = False,
) -> Iterator[MergedLayer]:
    """Yield the merged parameters of every adapted module, after checking values and outputs.

    Args:
        model: the model.
        names: the adapters, in order of activation.
        dtype: dtype of dense weights that replace quantized ones; None to requantize.
        checked: skip the comparison of outputs, because it was done before.
    """
    entries = {name: engine.applied(model, name) for name in names}
    paths = dict.fromkeys(path for entry in entries.values() for path in entry.paths)
    for path in paths:
        module = model.get_submodule(path)
        methods = {name: entry.method for name, entry in entries.items() if path in entry.placements}
        device_types = {p.device.type for p in module._parameters.values() if p is not None} - {"meta"}
        with torch.no_grad(), torch.autocast(min(device_types, default="cpu"), enabled=False):
            stored_format = find_weight_format(module)
            copies = merged_copies(path, module, methods, stored_format)
            changes_quantized = not copies.packed.keys().isdisjoint(copies.changed)
            if changes_quantized:
                layer = _quantized_layer(path, module, copies, dtype)
            else:
                layer = MergedLayer(path, _dense_tensors(module, copies, stored_format), None)
            _refuse_infinite(names, layer, stored_format)
            if not checked:
                _refuse_read_elsewhere(model, path, copies.changed)
                refuse_inexact(path, module, list(methods), copies.base, copies.merged, copies.changed)
        yield layer


def _refuse_infinite(names: tuple[str, ...], layer: MergedLayer, stored_format: WeightFormat | None) -> None:
    """Raise a PeftcoreError if a merged tensor contains NaN or Inf."""
    bad_dtypes = [t.dtype for t in layer.tensors.values() if t.is_floating_point() and not _is_finite(t)]
    # Quantized weights are stored as integers, which are always finite, so NaN can only be seen in the loss.
    if not bad_dtypes and math.isfinite(layer.lost or 0):
        return
    place = bad_dtypes[0] if bad_dtypes or stored_format is None else stored_format.name
    raise PeftcoreError(
        f"merging {list(names)} into '{layer.path}' gives NaN or Inf in {place}: an adapter contains NaN or Inf, or "
        "the sum overflows. Nothing was changed. Merge an earlier checkpoint of the adapter, or choose a wider dtype"
    )


def _refuse_read_elsewhere(model: nn.Module, path: str, changed: Iterable[str]) -> None:
    """Raise a PeftcoreError if code outside the module at `path` reads a parameter that merging changes.

    Adapters act only on calls of the module; after merging they would also affect that code (a tied autoencoder).
    """
    reads = external_reads(model)
    for name in changed:
        full = f"{path}.{name}" if path else name
        readers = {reader for reader in reads.get(full, ()) if not f"{reader}.".startswith(f"{path}.")}
        if path and readers:
            raise PeftcoreError(
                f"cannot merge into '{full}': {describe_reader(readers)} reads it without calling '{path}', so "
                "merging would also change that computation. Nothing was changed. Keep the adapters unmerged, or "
                "train them without this module (exclude_modules)"
            )


def merged_copies(
    path: str, module: nn.Module, methods: Mapping[str, str], stored_format: WeightFormat | None
) -> MergedCopies:
    """Merge adapters of a module into a copy; the module is not changed.

    Args:
        path: path of the module.
        module: the module.
        methods: {adapter name: method name}, in order of activation.
        stored_format: format in which the module stores its `weight`, or None.

    Raises:
        PluginError: `merged` of an adapter fails.
    """
    base = evaluated(module)
    packed = _dequantize(path, module, base, stored_format)
    copies = MergedCopies(base, evaluated(base, adapters=False), packed=packed)
    layer_adapters = _merge_parameter_changes(path, module, methods, copies)
    if layer_adapters:
        copy_format = DENSE if "weight" in packed else (stored_format or weight_format(module))
        _merge_layer_adapters(path, methods, layer_adapters, copies, copy_format)
    return copies


def _dequantize(
    path: str, module: nn.Module, copy: nn.Module, stored_format: WeightFormat | None
) -> dict[str, WeightFormat]:
    """Replace the quantized parameters of an evaluated copy by dense float32 ones; return {name: quantized format}."""
    packed: dict[str, WeightFormat] = {}
    for name in module._parameters:
        parameter_format = stored_format if name == "weight" else quantized_format(module, name)
        if parameter_format is not None and parameter_format.decode is not None:
            packed[name] = parameter_format
            put(copy, name, _with_values(path, module, parameter_format.read(module).detach()).float())
    return packed


def _merge_parameter_changes(
    path: str, module: nn.Module, methods: Mapping[str, str], copies: MergedCopies
) -> dict[str, Any]:
    """Merge the changes of single parameters (`OnWeight`), and return the adapters that act on the whole layer."""
    adapters = adapters_at(module)
    layer_adapters: dict[str, Any] = {}
    for adapter_name, method in methods.items():
        adapter, link = adapters._modules[adapter_name], adapters.links.get(adapter_name, Link)
        changes = link.changes_of(adapter)
        if not changes:
            layer_adapters[adapter_name] = adapter
        for name, change in changes.items():
            old_weight = _with_values(path, module, _get(copies.merged, name)).clone()
            with registry.naming(method, link.merges_by):
                _merge_change(module, copies, name, partial(link.merged_change, change), old_weight)
            copies.changed[name] = None
    return layer_adapters


def _merge_layer_adapters(
    path: str,
    methods: Mapping[str, str],
    layer_adapters: Mapping[str, Any],
    copies: MergedCopies,
    copy_format: WeightFormat,
) -> None:
    """Apply `merged` of the adapters around and after the module to the weight and bias of the merged copy.

    Args:
        copy_format: format that reads and writes the weight of the copies.
    """
    merged = copies.merged
    old_weight = _with_values(path, merged, copy_format.read(merged))
    old_bias = copy_format.read_bias(merged)
    # A plugin's `merged` may modify its arguments in place, so it gets clones.
    weight, bias = old_weight.clone(), old_bias
    for name, adapter in layer_adapters.items():
        bias_argument = None if bias is None else bias.clone()
        with registry.naming(methods[name], "merged"):
            result = adapter.merged(weight, bias_argument)
        weight, bias = _require_weight_and_bias(path, name, result, old_weight.shape, bias)
    new_tensors = copy_format.write(merged, weight)
    copies.weight = weight
    if bias is not None and not torch.equal(bias, cast(Tensor, copy_format.read_bias(merged))):
        copies.bias = bias
        new_tensors |= copy_format.write_bias(merged, bias)
    for name, tensor in new_tensors.items():
        put(merged, name, tensor)
        copies.changed[name] = None


def _merge_change(
    module: nn.Module, copies: MergedCopies, name: str, merged: Callable[..., Any], weight: Tensor
) -> None:
    """Merge the change of one parameter; for the stacked weight of experts, also the change of their biases."""
    layout = experts_layout(module)
    bias_name = None if layout is None else layout.bias_name(name)
    old_bias = None if bias_name is None else _get(copies.merged, bias_name)
    weight, bias = merged(weight, old_bias)
    put(copies.merged, name, weight)
    if bias_name is not None and bias is not None and old_bias is not None and not torch.equal(bias, old_bias):
        put(copies.merged, bias_name, bias)
        copies.changed[bias_name] = None


def _require_weight_and_bias(
    path: str, name: str, result: Any, shape: torch.Size, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the weight and bias that `merged` returned.

    Args:
        name: name of the adapter.
        result: return value of `merged`.
        shape: shape of the weight.
        bias: bias before `merged`, or None if the layer has none.

    Raises:
        PeftcoreError: `result` is not a weight and a bias of unchanged shapes.
    """
    is_pair = isinstance(result, tuple) and len(result) == 2
    weight, new_bias = result if is_pair else (result, None)
    function = f"'merged' of the adapter '{name}' at '{path}'"
    if not is_pair or not isinstance(weight, Tensor) or weight.shape != shape:
        raise PeftcoreError(
            f"{function} returned {_shape_or_type(weight)}{('' if is_pair else ' alone')} for a weight of shape "
            f"{list(shape)}. It must return (weight, bias), with bias None if it was None"
        )
    if bias is None and new_bias is not None:
        raise PeftcoreError(
            f"{function} returned a bias, but {path or 'the module'!r} has no bias. Nothing was changed. Keep the "
            "adapters unmerged, or train them without this module (exclude_modules)"
        )
    if bias is not None and (not isinstance(new_bias, Tensor) or new_bias.shape != bias.shape):
        raise PeftcoreError(
            f"{function} returned {_shape_or_type(new_bias)} for a bias of shape {list(bias.shape)}. It must "
            "return (weight, bias) of unchanged shapes"
        )
    return weight, new_bias


def _shape_or_type(value: Any) -> str:
    """Describe a return value in an error: the shape of a tensor, otherwise the type."""
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _dense_tensors(module: nn.Module, copies: MergedCopies, stored_format: WeightFormat | None) -> dict[str, Tensor]:
    """Return the tensors to store for a module whose changed parameters are dense, in their original dtypes."""
    layer_tensors: dict[str, Tensor] = {}
    if stored_format is not None and copies.weight is not None:
        layer_tensors |= stored_format.write(module, copies.weight)
    tensors: dict[str, Tensor] = {}
    for name in copies.changed:
        if name not in layer_tensors:
            tensors[name] = _get(copies.merged, name).to(_get(module, name).dtype)
    tensors |= layer_tensors
    if stored_format is not None and copies.bias is not None:
        tensors |= stored_format.write_bias(module, copies.bias)
    return tensors


def _quantized_layer(path: str, module: nn.Module, copies: MergedCopies, dtype: torch.dtype | None) -> MergedLayer:
    """Return the tensors to store for a module with quantized parameters, and the largest loss of one parameter.

    Args:
        dtype: dtype of dense weights that replace the quantized ones; None to quantize the merged weights again.
    """
    tensors: dict[str, Tensor] = {}
    losses: list[float] = []
    for name in copies.changed:
        old_weight, weight = _get(copies.base, name), _get(copies.merged, name)
        parameter_format = copies.packed.get(name)
        if parameter_format is None:
            tensors[name] = weight.to(_get(module, name).dtype)
        elif dtype is not None:
            tensors[name] = weight.to(dtype)
        elif not torch.equal(weight, old_weight):  # requantizing an unchanged weight would round it a second time
            new_tensors = parameter_format.write(module, weight)
            assert parameter_format.decode is not None
            error = parameter_format.decode(module, new_tensors) - weight
            losses.append((error.norm() / (weight - old_weight).norm()).item())
            tensors |= new_tensors
    formats = [copies.packed[name] for name in copies.changed if name in copies.packed]
    unpacked = formats[0] if dtype is not None else None
    return MergedLayer(path, tensors, max(losses, default=None), unpacked)


def _with_values(path: str, module: nn.Module, tensor: Tensor) -> Tensor:
    """Return `tensor`, a weight of `module`; raise a PeftcoreError if it is on the meta device."""
    if tensor.is_meta:
        if "_hf_hook" in module.__dict__:
            raise PeftcoreError(
                f"cannot merge into '{path}', because accelerate offloads its weights between calls. Remove "
                "accelerate's hooks first: accelerate.hooks.remove_hook_from_module(model, recurse=True)"
            )
        raise PeftcoreError(
            f"cannot merge into '{path}', because its weight is on the meta device and has no values. Load the "
            "model's weights first"
        )
    return tensor


def _get(module: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    return cast(Tensor, getattr(module.get_submodule(path), attribute)).detach()


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.numel():
        return True
    smallest, largest = torch.aminmax(tensor)  # both are NaN if an element is NaN
    return bool(smallest.isfinite() and largest.isfinite())


def measured_error(model: nn.Module, names: tuple[str, ...], dtype: torch.dtype | None) -> dict[str, float]:
    """Return {path: error of merging} for the quantized layers."""
    return {layer.path: layer.lost for layer in merged_layers(model, names, dtype) if layer.lost is not None}


def changes_nothing(model: nn.Module, adapter: str) -> bool:
    """Return whether merging `adapter` would leave all weights unchanged; False if it cannot be merged."""
    trained_parameters = TrainedParameters.of(model, adapter)
    if trained_parameters is not None:
        if trained_parameters.differs_from_base(model):
            return False
        values, originals = trained_parameters.values(model), trained_parameters.originals(model)
        for (_, value), (_, original) in zip(values, originals, strict=True):
            if not torch.equal(value, original):
                return False
    for path, module in engine.modules_with(model, engine.require_state(model), adapter):
        if not is_mergeable(module, adapter):
            return False
        methods = {adapter: engine.applied(model, adapter).method}
        with torch.no_grad():
            if merged_copies(path, module, methods, find_weight_format(module)).differs():
                return False
    return True
