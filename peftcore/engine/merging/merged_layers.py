"""Merge adapted modules one by one: compute and check merged parameters, and measure the requantization error.

    error = |stored weight - merged weight| / |merged weight - original weight|     (Frobenius norms)

Merging works on a shallow copy in float32: first changes of single parameters (`OnWeight`), which the module's own
forward reads, then `merged` of adapters around and after the module, each in order of activation.
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
    """One merged module.

    Args:
        tensors: tensors to store, by name in the module.
        lost: fraction of the change that requantizing loses; None if nothing is quantized.
        unpacked: format of the quantized weight that a dense weight replaces.
    """

    path: str
    tensors: dict[str, Tensor]
    lost: float | None
    unpacked: WeightFormat | None = None

    def named(self) -> list[tuple[str, Tensor]]:
        """Return (full name, tensor) for each tensor to store."""
        prefix = f"{self.path}." if self.path else ""
        return [(prefix + attribute, tensor) for attribute, tensor in self.tensors.items()]


@dataclass
class MergedCopies:
    """Two float32 copies of a module, with the base's and with merged parameters.

    Args:
        changed: names of the parameters that may differ.
        packed: {name of a quantized parameter: its format}.
        weight, bias: merged weight and bias in the layout of the module's format, if adapters of the layer changed
            them.
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
        acting = {name: entry.method for name, entry in entries.items() if path in entry.placements}
        kinds = {p.device.type for p in module._parameters.values() if p is not None} - {"meta"}
        with torch.no_grad(), torch.autocast(min(kinds, default="cpu"), enabled=False):
            weight_format_of_module = find_weight_format(module)
            copies = merged_copies(path, module, acting, weight_format_of_module)
            if not copies.packed.keys().isdisjoint(copies.changed):
                layer = _packed(path, module, copies, dtype)
            else:
                layer = MergedLayer(path, _stored(module, copies, weight_format_of_module), None)
            bad = [t.dtype for t in layer.tensors.values() if t.is_floating_point() and not _is_finite(t)]
            if bad or not math.isfinite(layer.lost or 0):
                place = bad[0] if bad or weight_format_of_module is None else weight_format_of_module.name
                raise PeftcoreError(
                    f"merging {list(names)} into '{path}' gives NaN or Inf in {place}: an adapter contains NaN or "
                    "Inf, or the sum overflows. Nothing was changed. Merge an earlier checkpoint of the adapter, or "
                    "choose a wider dtype"
                )
            if not checked:
                _refuse_read_elsewhere(model, path, copies.changed)
                refuse_inexact(path, module, list(acting), copies.base, copies.merged, copies.changed)
        yield layer


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
    path: str, module: nn.Module, methods: Mapping[str, str], layout: WeightFormat | None
) -> MergedCopies:
    """Merge adapters of a module into a copy; the module is not changed.

    Args:
        path: path of the module.
        module: the module.
        methods: {adapter name: method name}, in order of activation.
        layout: the module's weight format, or None.

    Raises:
        PluginError: `merged` of an adapter fails.
    """
    base, packed = evaluated(module), dict[str, WeightFormat]()
    for name in module._parameters:
        stored_format = layout if name == "weight" else quantized_format(module, name)
        if stored_format is not None and stored_format.decode is not None:
            packed[name] = stored_format
            put(base, name, _with_values(path, module, stored_format.read(module).detach()).float())
            layout = DENSE if name == "weight" else layout
    copies = MergedCopies(base, evaluated(base, adapters=False), packed=packed)
    adapters, module_adapters = adapters_at(module), dict[str, Any]()
    for adapter_name, method in methods.items():
        adapter, link = adapters._modules[adapter_name], adapters.links.get(adapter_name, Link)
        changes = link.changes_of(adapter)
        if not changes:
            module_adapters[adapter_name] = adapter
        for name, change in changes.items():
            old_weight = _with_values(path, module, _get(copies.merged, name)).clone()
            with registry.naming(method, link.merges_by):
                _merge_change(module, copies, name, partial(link.merged_change, change), old_weight)
            copies.changed[name] = None
    if not module_adapters:
        return copies
    layout = layout or weight_format(module)
    old_weight = _with_values(path, module, layout.read(copies.merged))
    weight, bias = old_weight.clone(), layout.read_bias(copies.merged)  # a plugin's `merged` may modify its arguments
    for name, adapter in module_adapters.items():
        bias_argument = None if bias is None else bias.clone()
        with registry.naming(methods[name], "merged"):
            stored_format = adapter.merged(weight, bias_argument)
        weight, bias = _checked(path, name, stored_format, old_weight.shape, bias)
    copies.weight, copies.bias = weight, bias
    new_tensors = layout.write(copies.merged, weight)
    if bias is not None and not torch.equal(bias, cast(Tensor, layout.read_bias(copies.merged))):
        new_tensors |= layout.write_bias(copies.merged, bias)
    else:
        copies.bias = None
    for name, tensor in new_tensors.items():
        put(copies.merged, name, tensor)
        copies.changed[name] = None
    return copies


def _merge_change(
    module: nn.Module, copies: MergedCopies, name: str, merged: Callable[..., Any], weight: Tensor
) -> None:
    """Merge the change of one parameter, and of the experts' biases if it is the stacked weight of experts."""
    layout = experts_layout(module)
    bias_name = None if layout is None else layout.bias_name(name)
    old_bias = None if bias_name is None else _get(copies.merged, bias_name)
    weight, bias = merged(weight, old_bias)
    put(copies.merged, name, weight)
    if bias_name is not None and bias is not None and old_bias is not None and not torch.equal(bias, old_bias):
        put(copies.merged, bias_name, bias)
        copies.changed[bias_name] = None


def _checked(path: str, name: str, result: Any, shape: torch.Size, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Check that `merged` has returned a valid weight and bias, and return them."""
    is_pair = isinstance(result, tuple) and len(result) == 2
    weight, new_bias = result if is_pair else (result, None)
    function = f"'merged' of the adapter '{name}' at '{path}'"
    if not is_pair or not isinstance(weight, Tensor) or weight.shape != shape:
        raise PeftcoreError(
            f"{function} returned {_shown(weight)}{('' if is_pair else ' alone')} for a weight of shape "
            f"{list(shape)}. It must return (weight, bias), with bias None if it was None"
        )
    if bias is None and new_bias is not None:
        raise PeftcoreError(
            f"{function} returned a bias, but {path or 'the module'!r} has no bias. Nothing was changed. Keep the "
            "adapters unmerged, or train them without this module (exclude_modules)"
        )
    if bias is not None and (not isinstance(new_bias, Tensor) or new_bias.shape != bias.shape):
        raise PeftcoreError(
            f"{function} returned {_shown(new_bias)} for a bias of shape {list(bias.shape)}. It must return (weight, "
            "bias) of unchanged shapes"
        )
    return weight, new_bias


def _shown(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _stored(module: nn.Module, copies: MergedCopies, layout: WeightFormat | None) -> dict[str, Tensor]:
    """Return the tensors to store for a dense module, in their original dtypes."""
    tensors: dict[str, Tensor] = {}
    layout_tensors = {} if copies.weight is None or layout is None else layout.write(module, copies.weight)
    for name in copies.changed:
        if name not in layout_tensors:
            tensors[name] = _get(copies.merged, name).to(_get(module, name).dtype)
    tensors |= layout_tensors
    if copies.bias is not None and layout is not None:
        tensors |= layout.write_bias(module, copies.bias)
    return tensors


def _packed(path: str, module: nn.Module, copies: MergedCopies, dtype: torch.dtype | None) -> MergedLayer:
    """Merge a module with quantized parameters; its error is the largest error of its parameters."""
    tensors: dict[str, Tensor] = {}
    losses: list[float] = []
    for name in copies.changed:
        old_weight, weight, weight_format = _get(copies.base, name), _get(copies.merged, name), copies.packed.get(name)
        if weight_format is None:
            tensors[name] = weight.to(_get(module, name).dtype)
        elif dtype is not None:
            tensors[name] = weight.to(dtype)
        elif not torch.equal(weight, old_weight):  # requantizing an unchanged weight would round it a second time
            new_tensors = weight_format.write(module, weight)
            assert weight_format.decode is not None
            losses.append(
                ((weight_format.decode(module, new_tensors) - weight).norm() / (weight - old_weight).norm()).item()
            )
            tensors |= new_tensors
    formats = [copies.packed[name] for name in copies.changed if name in copies.packed]
    unpacked = formats[0] if dtype is not None else None
    return MergedLayer(path, tensors, max(losses, default=None), unpacked)


def _with_values(path: str, module: nn.Module, tensor: Tensor) -> Tensor:
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
    smallest, largest = torch.aminmax(tensor)  # NaN is kept
    return bool(smallest.isfinite() and largest.isfinite())


def measured_error(model: nn.Module, names: tuple[str, ...], dtype: torch.dtype | None) -> dict[str, float]:
    """Return {path: error of merging} for the quantized layers."""
    return {layer.path: layer.lost for layer in merged_layers(model, names, dtype) if layer.lost is not None}


def changes_nothing(model: nn.Module, adapter: str) -> bool:
    """Return whether merging `adapter` leaves all weights unchanged; False if it does not only change weights."""
    own_tensors = TrainedParameters.of(model, adapter)
    if own_tensors is not None:
        pairs = zip(own_tensors.values(model), own_tensors.originals(model), strict=True)
        if own_tensors.differs_from_base(model) or not all(
            torch.equal(value, original) for (_, value), (_, original) in pairs
        ):
            return False
    for path, module in engine.modules_with(model, engine.require_state(model), adapter):
        if not is_mergeable(module, adapter):
            return False
        methods = {adapter: engine.applied(model, adapter).method}
        with torch.no_grad():
            if merged_copies(path, module, methods, find_weight_format(module)).differs():
                return False
    return True
