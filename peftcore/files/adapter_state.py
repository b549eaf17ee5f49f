"""`state_dict` and `set_state_dict`: read and replace the values of an applied adapter.

Tensors are filled in place and no attribute of a module is set, so a compiled model is not recompiled. If the other
adapter has a different scale, B absorbs it; if its rank is smaller, the last rows of A and columns of B are zero.
"""

from __future__ import annotations

import dataclasses
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftcore import engine
from peftcore.engine.composing.compatibility import difference, has_nonpersistent_buffers
from peftcore.engine.scaling import scaled_config, set_multiplier
from peftcore.errors import CheckpointError
from peftcore.files.fitting import config_on, refuse_other_base
from peftcore.files.metadata import ties_partly
from peftcore.files.reading import read_adapter
from peftcore.files.tensors import fill, kept_on_disk, tensors_on_disk
from peftcore.plugin import ranks
from peftcore.plugin.adapter import Adapter, LowRank, implements
from peftcore.plugin.method import Method, Model
from peftcore.plugin.peft_fields import guarded, peft_version
from peftcore.plugin.registry import registry

_OWN = "peftcore"  # key in the dictionary's `_metadata`, which PyTorch uses for versions of modules


def state_dict(model: nn.Module, adapter: str) -> OrderedDict[str, Tensor]:
    """Return copies of the tensors of `adapter`, by the names that `save` gives them, on their devices.

    `_metadata` of the dictionary holds the adapter's config for `set_state_dict`. If the model is sharded, the tensors
    are whole and every rank must call this function.

    Raises:
        PeftcoreError: no adapter with this name is applied, or adapters are merged.
    """
    engine.refuse_merged(engine.require_state(model), "read an adapter's state")
    engine.refuse_changed(model)
    ranks.reshard(model)
    tensors = {**tensors_on_disk(model, adapter, exported=True), **kept_on_disk(model, adapter)}
    whole = {name: ranks.whole(tensor).clone() for name, tensor in tensors.items()}
    entry = engine.applied(model, adapter)
    with registry.naming(entry.method, "write"):
        fields = dataclasses.asdict(entry.config)
        found = OrderedDict(registry.method(entry.method).state.write(model, whole, fields)[0])
    config = dataclasses.asdict(scaled_config(model, adapter))
    found._metadata = {_OWN: {"method": entry.method, "config": config}}  # type: ignore[attr-defined]
    return found


@engine.exclusive("set an adapter's values", base=True)
def set_state_dict(
    model: Model, adapter: str, source: str | os.PathLike[str] | Mapping[str, Tensor], *, check_base: bool = True
) -> Model:
    """Replace the values of an applied adapter by those of another, in place; a compiled model is not recompiled.

    `adapter` then computes what the other adapter would compute if it were loaded. It keeps its name and dtype, and a
    factor set by `scale` becomes 1 again. Low-rank adapters may differ in scale and have a smaller rank; at modules
    that the other adapter does not change, B becomes 0.

    Args:
        model: the model the adapter is on.
        adapter: name of the adapter whose values are replaced.
        source: a folder as `load` takes it, or a dictionary from `state_dict`. Other dictionaries of tensors, by their
            names on disk, must come from an adapter with the same config.
        check_base: compare fingerprints of the base, as in `load`. Dictionaries have none.

    Returns:
        The model.

    Raises:
        CheckpointError: the source is of another method, has a larger rank or other modules, or cannot be read.
            Nothing is changed.
    """
    state, entry = engine.require_state(model), engine.applied(model, adapter)
    engine.refuse_merged(state, f"set the values of '{adapter}'")
    engine.refuse_changed(model)
    ranks.refuse_sharded(model, f"set the values of '{adapter}'")
    before = entry.multiplier
    set_multiplier(model, adapter, 1.0)  # the other adapter's values are fitted to the scale of the config
    try:
        _set(model, adapter, source, check_base)
    except BaseException:
        set_multiplier(model, adapter, before)
        raise
    return model


def _set(model: nn.Module, adapter: str, source: Any, check_base: bool) -> None:
    entry = engine.applied(model, adapter)
    method, partly_tied, config = registry.method(entry.method), False, entry.config
    if isinstance(source, Mapping):
        where, tensors = Path("state_dict"), dict(source)
        own = getattr(source, "_metadata", {}).get(_OWN)
        if own is not None:
            _refuse_other(method, registry.method(own["method"]), adapter, where)
            config = method.config_class(**own["config"])
        with guarded(method, f"'{where}'"):
            fields = {**method.state.write_fields(dataclasses.asdict(config)), "peft_version": peft_version()}
            tensors = dict(method.state.read(model, tensors, fields)[0])
        if own is None:
            _refuse_other_shapes(model, adapter, tensors)
    else:
        where = Path(source)
        other, config, tensors, metadata = read_adapter(where, model, applied=method.name)
        _refuse_other(method, other, adapter, where)
        if check_base:
            refuse_other_base(model, where, metadata, f"peftcore.set_state_dict(model, {adapter!r}, ...")
        config, partly_tied = config_on(model, method, config, tensors, metadata), ties_partly(metadata)
    if not _same(config, entry.config):
        tensors = _fitted(model, adapter, method, config, tensors, where)
    fill(model, adapter, tensors, where, partly_tied=partly_tied)


def _refuse_other(method: Method, other: Method, adapter: str, where: Path) -> None:
    if other.name != method.name:
        raise CheckpointError(
            f"'{where}' is an adapter of {other.name}, but '{adapter}' is of {method.name}. Load it as another "
            f"adapter: peftcore.load(model, folder, adapter=...), then activate it and remove '{adapter}'"
        )


def _refuse_other_shapes(model: nn.Module, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    for name, here in tensors_on_disk(model, adapter).items():
        if name in tensors and tensors[name].shape != here.shape:
            raise CheckpointError(
                f"'{name}' has shape {list(tensors[name].shape)}, here {list(here.shape)}. Tensors of another shape "
                "need their config: pass the adapter's folder, or a dictionary from peftcore.state_dict"
            )


def _same(one: Any, other: Any) -> bool:
    """Return whether two configs are equal, ignoring the order of lists."""

    def comparable(config: Any) -> dict[str, Any]:
        fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        return {n: sorted(map(str, v)) or None if isinstance(v, (list, tuple, set)) else v for n, v in fields.items()}

    return comparable(one) == comparable(other)


def _fitted(
    model: nn.Module, adapter: str, method: Method, config: Any, tensors: dict[str, Tensor], where: Path
) -> dict[str, Tensor]:
    """Return the tensors of an adapter with another config, in the shapes of the applied one."""

    def refuse(why: str) -> CheckpointError:
        return CheckpointError(
            f"'{adapter}' cannot take the values of '{where}': {why}. Load it as another adapter: "
            "peftcore.load(model, folder, adapter=...)"
        )

    entry = engine.applied(model, adapter)
    for name in method.trained_fields:
        theirs, own = getattr(config, name), getattr(entry.config, name)
        if theirs != own:
            raise refuse(f"training has changed {name} to {theirs} there and {own} here, and with it the shapes")
    if entry.trained:
        raise refuse(f"it trains parameters of the base, such as '{entry.trained[0]}', and the configs differ")
    with torch.device("meta"), guarded(method, f"'{where}'"):
        placed = engine.placements_for(model, config, {})
    if any(has_nonpersistent_buffers(each.adapter) for each in placed.attached):
        with torch.random.fork_rng(devices=[]), guarded(method, f"'{where}'"):
            placed = engine.placements_for(model, config, {})
    wanted = {each.path: each.adapter for each in placed.attached}
    applied = dict(engine.adapter_modules(model, adapter))
    more = next((path for path in wanted if path not in applied), None)
    if more is not None or placed.trained:
        raise refuse(f"it changes '{more or placed.trained[0]}', and '{adapter}' does not")
    tensors, rules = dict(tensors), method.state
    for path, placements in entry.placements.items():
        if path not in applied:
            continue
        here, other = applied[path], wanted.get(path)
        own, theirs = _own_factors(here), None if other is None else _own_factors(other)
        is_low_rank = own is not None and (other is None or theirs is not None)
        why = (
            difference(here, other, numbers=not is_low_rank)
            if other is not None
            else None
            if is_low_rank
            else "nothing is there"
        )
        if why:
            raise refuse(f"it differs at '{path}': {why}")
        if own is None or not is_low_rank:
            continue
        names = {
            id(tensor): rules.tensor_name(each, name) for each in placements for name, tensor in _tensors(each.adapter)
        }
        for number, factors in enumerate(own):
            a, b = names[id(factors.a)], names[id(factors.b)]
            if theirs is None:
                tensors[a], tensors[b] = factors.a.detach(), torch.zeros_like(factors.b)
            elif a in tensors and b in tensors:  # otherwise `fill` raises for the missing tensor
                _fit(tensors, a, b, factors, theirs[number], where)
    return tensors


def _fit(tensors: dict[str, Tensor], a: str, b: str, here: LowRank, there: LowRank, where: Path) -> None:
    """Bring the tensors named `a` and `b` to the rank and scale of `here`."""
    for name, wanted in ((a, there.a), (b, there.b)):
        if tensors[name].shape != wanted.shape:
            raise CheckpointError(
                f"'{where}': '{name}' has shape {list(tensors[name].shape)}, its config says {list(wanted.shape)}"
            )
    r, most = there.a.shape[0], here.a.shape[0]
    if r > most:
        raise CheckpointError(
            f"'{where}' has rank {r} at '{a}', and the applied adapter has {most}, which cannot grow in place. Apply "
            f"with r={r} or more before compiling the model; smaller ranks fit into that"
        )
    ratio = there.scale / here.scale
    tensors[a] = _padded(tensors[a], 0, most)
    tensors[b] = _padded(tensors[b] if ratio == 1 else tensors[b].float() * ratio, 1, most)


def _padded(tensor: Tensor, dim: int, size: int) -> Tensor:
    if tensor.shape[dim] == size:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def _own_factors(adapter: Any) -> list[LowRank] | None:
    """Return the factors of an adapter that has no other tensors, or None."""
    if not implements(adapter, Adapter.low_rank):
        return None
    factors = list(adapter.low_rank())
    known = {id(tensor) for each in factors for tensor in (each.a, each.b)}
    return factors if {id(tensor) for _, tensor in _tensors(adapter)} == known else None


def _tensors(adapter: nn.Module) -> list[tuple[str, Tensor]]:
    return [*adapter.named_parameters(), *adapter.named_buffers()]
