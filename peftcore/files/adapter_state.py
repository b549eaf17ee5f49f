"""`state_dict` and `set_state_dict`: read and replace the values of an applied adapter.

Tensors are filled in place, and no attribute of a module is set, so a compiled model is not recompiled. If the other
adapter has another scale, B absorbs the ratio. If the other rank is smaller, the last rows of A and columns of B are
zero.
"""

from __future__ import annotations

import dataclasses
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from peftcore import engine
from peftcore.engine.attachments import AdapterAttachments
from peftcore.engine.composing.compatibility import difference, has_nonpersistent_buffers
from peftcore.engine.scaling import scaled_config, set_multiplier
from peftcore.errors import CheckpointError
from peftcore.files.fitting import config_on, refuse_other_base
from peftcore.files.metadata import ties_partly
from peftcore.files.reading import read_adapter
from peftcore.files.tensors import fill, kept_on_disk, tensors_on_disk
from peftcore.plugin import sharded
from peftcore.plugin.adapter import Adapter, LowRank, implements
from peftcore.plugin.method import Method, Model
from peftcore.plugin.peft_fields import guarded, peft_version
from peftcore.plugin.placements.placement import Placement
from peftcore.plugin.registry import registry

_METADATA_KEY = "peftcore"  # key in the dictionary's `_metadata`, which PyTorch uses for versions of modules

_Source: TypeAlias = "str | os.PathLike[str] | Mapping[str, Tensor]"


def state_dict(model: nn.Module, adapter: str) -> OrderedDict[str, Tensor]:
    """Return copies of the tensors of `adapter` on their devices, by the names that `save` gives them.

    The dictionary's `_metadata` holds the adapter's config for `set_state_dict`. If the model is sharded, the tensors
    are full tensors, and every rank must call this function.

    Raises:
        PeftcoreError: no adapter with this name is applied, or adapters are merged.

    Examples:
        >>> best = peftcore.state_dict(model, "default")
        >>> peftcore.set_state_dict(model, "default", best)
    """
    engine.refuse_merged(engine.require_state(model), "read an adapter's state")
    engine.refuse_changed(model)
    sharded.reshard(model)
    tensors = {**tensors_on_disk(model, adapter, exported=True), **kept_on_disk(model, adapter)}
    full_tensors = {name: sharded.whole(tensor).clone() for name, tensor in tensors.items()}
    entry = engine.applied(model, adapter)
    with registry.naming(entry.method, "write"):
        fields = dataclasses.asdict(entry.config)
        state = OrderedDict(registry.method(entry.method).state.write(model, full_tensors, fields)[0])
    config = dataclasses.asdict(scaled_config(model, adapter))
    state._metadata = {_METADATA_KEY: {"method": entry.method, "config": config}}  # type: ignore[attr-defined]
    return state


@engine.exclusive("set an adapter's values", base=True)
def set_state_dict(model: Model, adapter: str, source: _Source, *, check_base: bool = True) -> Model:
    """Replace the values of an applied adapter by another's, in place. A compiled model is not recompiled.

    `adapter` then computes what the other adapter would compute if it were loaded. Its name and dtype stay, and a
    multiplier set by `scale` is reset to 1. With a low-rank method, the other adapter may have a different scale, a
    smaller rank, or fewer modules. In modules that it lacks, B becomes 0.

    Args:
        model: the model the adapter is on.
        adapter: name of the adapter whose values are replaced.
        source: a local folder that `load` accepts, or a dictionary from `state_dict`. A plain dictionary of tensors by
            their names on disk must come from an adapter with the same config.
        check_base: compare fingerprints of the base, as in `load`. Dictionaries have none.

    Returns:
        The model.

    Raises:
        CheckpointError: the source has another method, a larger rank or additional modules, or cannot be read. Nothing
            is changed.

    Examples:
        >>> peftcore.set_state_dict(model, "default", "other-adapter")
    """
    state, entry = engine.require_state(model), engine.applied(model, adapter)
    engine.refuse_merged(state, f"set the values of '{adapter}'")
    engine.refuse_changed(model)
    sharded.refuse_sharded(model, f"set the values of '{adapter}'")
    previous = entry.multiplier
    set_multiplier(model, adapter, 1.0)  # the other adapter's values are converted to this config's scale
    try:
        _set(model, adapter, source, check_base)
    except BaseException:
        set_multiplier(model, adapter, previous)
        raise
    return model


@dataclass(frozen=True)
class _Values:
    """Values for an applied adapter.

    Args:
        where: the source, for error messages.
        config: config of the source adapter.
        tensors: tensors by their names on disk.
        partly_tied: the source may have a tied parameter under only one of its names.
    """

    where: Path
    config: Any
    tensors: dict[str, Tensor]
    partly_tied: bool = False


def _set(model: nn.Module, adapter: str, source: _Source, check_base: bool) -> None:
    if isinstance(source, Mapping):
        values = _values_from_dictionary(model, adapter, source)
    else:
        values = _values_from_folder(model, adapter, Path(source), check_base)
    tensors = values.tensors
    if not _are_equal(values.config, engine.applied(model, adapter).config):
        tensors = _fit_tensors(model, adapter, values)
    fill(model, adapter, tensors, values.where, partly_tied=values.partly_tied)


def _values_from_dictionary(model: nn.Module, adapter: str, source: Mapping[str, Tensor]) -> _Values:
    """Read the values from a dictionary. Without the config that `state_dict` adds, the shapes must match."""
    entry, where = engine.applied(model, adapter), Path("state_dict")
    method, config = registry.method(entry.method), entry.config
    config_fields = getattr(source, "_metadata", {}).get(_METADATA_KEY)
    if config_fields is not None:
        _refuse_other(method, registry.method(config_fields["method"]), adapter, where)
        config = method.config_class(**config_fields["config"])
    with guarded(method, f"'{where}'"):
        fields = {**method.state.write_fields(dataclasses.asdict(config)), "peft_version": peft_version()}
        tensors = dict(method.state.read(model, dict(source), fields)[0])
    if config_fields is None:
        _refuse_other_shapes(model, adapter, tensors)
    return _Values(where, config, tensors)


def _values_from_folder(model: nn.Module, adapter: str, folder: Path, check_base: bool) -> _Values:
    method = registry.method(engine.applied(model, adapter).method)
    stored = read_adapter(folder, model, applied=method.name)
    _refuse_other(method, stored.method, adapter, folder)
    if check_base:
        refuse_other_base(model, folder, stored.metadata, f"peftcore.set_state_dict(model, {adapter!r}, ...")
    config = config_on(model, method, stored.config, stored.tensors, stored.metadata)
    return _Values(folder, config, stored.tensors, partly_tied=ties_partly(stored.metadata))


def _refuse_other(method: Method, other: Method, adapter: str, source: Path) -> None:
    if other.name != method.name:
        raise CheckpointError(
            f"'{source}' is an adapter of method {other.name}, but '{adapter}' uses {method.name}. Load it under "
            f"another name (peftcore.load(model, folder, adapter=...)), then activate it and remove '{adapter}'"
        )


def _refuse_other_shapes(model: nn.Module, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    for name, applied_tensor in tensors_on_disk(model, adapter).items():
        if name in tensors and tensors[name].shape != applied_tensor.shape:
            raise CheckpointError(
                f"'{name}' has shape {list(tensors[name].shape)}, but the applied adapter has "
                f"{list(applied_tensor.shape)}. To change the shapes, pass values with a config: the adapter's "
                "folder, or a dictionary from peftcore.state_dict"
            )


def _are_equal(one: Any, other_config: Any) -> bool:
    """Return whether two configs are equal, ignoring the order of lists."""

    def comparable(config: Any) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if isinstance(value, (list, tuple, set)):
                value = sorted(map(str, value)) or None
            fields[field.name] = value
        return fields

    return comparable(one) == comparable(other_config)


def _fit_tensors(model: nn.Module, adapter: str, values: _Values) -> dict[str, Tensor]:
    """Convert the tensors of an adapter with another config to the shapes of the applied one.

    Raises:
        CheckpointError: the adapters differ in more than rank and scale.
    """

    def refuse(reason: str) -> CheckpointError:
        return CheckpointError(
            f"'{adapter}' cannot take the values of '{values.where}': {reason}. Load them under another name: "
            "peftcore.load(model, folder, adapter=...)"
        )

    entry = engine.applied(model, adapter)
    method = registry.method(entry.method)
    reason = _why_fixed(entry, method, values.config)
    if reason is not None:
        raise refuse(reason)
    applied_adapters = dict(engine.adapter_modules(model, adapter))
    attachments = _build_attachments(model, method, values)
    other_adapters = {attached.path: attached.adapter for attached in attachments.attached}
    unknown = [*(path for path in other_adapters if path not in applied_adapters), *attachments.trained]
    if unknown:
        raise refuse(f"it changes '{unknown[0]}', but '{adapter}' does not")
    tensors = dict(values.tensors)
    for path, placements in entry.placements.items():
        if path not in applied_adapters:
            continue
        factors, other_factors = _factors(applied_adapters[path]), _factors(other_adapters.get(path))
        is_low_rank = factors is not None and (path not in other_adapters or other_factors is not None)
        reason = _why_different(applied_adapters[path], other_adapters.get(path), is_low_rank)
        if reason is not None:
            raise refuse(f"it differs at '{path}': {reason}")
        if factors is not None and is_low_rank:
            _fit_factors(tensors, method, placements, factors, other_factors, values.where)
    return tensors


def _why_fixed(entry: engine.Applied, method: Method, config: Any) -> str | None:
    """Return the reason why the adapter cannot take values from an adapter with another config, or None."""
    for name in method.trained_fields:
        value, other_value = getattr(entry.config, name), getattr(config, name)
        if other_value != value:
            return (
                f"training has changed {name}, which determines the shapes, to {other_value} in the source and to "
                f"{value} in the applied adapter"
            )
    if entry.trained:
        return f"the applied adapter trains base parameters, such as '{entry.trained[0]}', and the configs differ"
    return None


def _build_attachments(model: nn.Module, method: Method, values: _Values) -> AdapterAttachments:
    """Build the other config's adapters, on the meta device unless they have tensors that files do not contain."""
    with torch.device("meta"), guarded(method, f"'{values.where}'"):
        attachments = engine.placements_for(model, values.config, {})
    if any(has_nonpersistent_buffers(attached.adapter) for attached in attachments.attached):
        with torch.random.fork_rng(devices=[]), guarded(method, f"'{values.where}'"):
            attachments = engine.placements_for(model, values.config, {})
    return attachments


def _why_different(adapter: nn.Module, other: nn.Module | None, is_low_rank: bool) -> str | None:
    """Describe how two adapters differ, ignoring rank and scale of low-rank adapters; None if they do not."""
    if other is not None:
        return difference(adapter, other, numbers=not is_low_rank)
    return None if is_low_rank else "nothing is there"


def _fit_factors(
    tensors: dict[str, Tensor],
    method: Method,
    placements: Iterable[Placement],
    applied_factors: Sequence[LowRank],
    other_factors: Sequence[LowRank] | None,
    source: Path,
) -> None:
    """Convert the factors of one module to the applied ranks and scales.

    `other_factors` is None for a module that the other adapter does not change.
    """
    names: dict[int, str] = {}
    for placement in placements:
        for name, tensor in _tensors(placement.adapter):
            names[id(tensor)] = method.state.tensor_name(placement, name)
    for number, factors in enumerate(applied_factors):
        a, b = names[id(factors.a)], names[id(factors.b)]
        if other_factors is None:
            tensors[a], tensors[b] = factors.a.detach(), torch.zeros_like(factors.b)
        elif a in tensors and b in tensors:  # otherwise `fill` raises for the missing tensor
            _fit_factor_pair(tensors, a, b, factors, other_factors[number], source)


def _fit_factor_pair(
    tensors: dict[str, Tensor], a: str, b: str, applied: LowRank, other: LowRank, source: Path
) -> None:
    """Convert the tensors named `a` and `b` to the rank and scale of `applied`."""
    for name, factor in ((a, other.a), (b, other.b)):
        if tensors[name].shape != factor.shape:
            raise CheckpointError(
                f"'{source}': '{name}' has shape {list(tensors[name].shape)}, but its config implies "
                f"{list(factor.shape)}. Copy the files again"
            )
    r, applied_r = other.a.shape[0], applied.a.shape[0]
    if r > applied_r:
        raise CheckpointError(
            f"'{source}' has rank {r} at '{a}', but the applied adapter has {applied_r} and cannot grow in place. "
            f"Apply it with r={r} or more before compiling the model; adapters of smaller ranks fit as well"
        )
    ratio = other.scale / applied.scale
    tensors[a] = _pad(tensors[a], 0, applied_r)
    tensors[b] = _pad(tensors[b] if ratio == 1 else tensors[b].float() * ratio, 1, applied_r)


def _pad(tensor: Tensor, dim: int, size: int) -> Tensor:
    if tensor.shape[dim] == size:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def _factors(adapter: nn.Module | None) -> list[LowRank] | None:
    """Return the factors of an adapter that has no other tensors, or None."""
    if not implements(adapter, Adapter.low_rank):
        return None
    factors = list(adapter.low_rank())
    factor_ids = {id(product.a) for product in factors} | {id(product.b) for product in factors}
    return factors if {id(tensor) for _, tensor in _tensors(adapter)} == factor_ids else None


def _tensors(adapter: nn.Module) -> list[tuple[str, Tensor]]:
    return [*adapter.named_parameters(), *adapter.named_buffers()]
