"""`state_dict` and `swap`: the values of an adapter that stands, taken out and exchanged, with nothing else changed.

Tensors are filled in place and no attribute of a module is set, so a compiled model is not compiled again. Where the
other adapter has another scale, B takes it; where its rank is smaller, the last rows of A and columns of B are zero.
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

from peftcore import checkpoint, engine, ranks
from peftcore.checkpoint.fitting import config_on, refuse_other_base
from peftcore.checkpoint.reading import ties_partly
from peftcore.checkpoint.tensors import fill, kept_on_disk, tensors_on_disk
from peftcore.composing.likeness import difference, has_values_of_its_config
from peftcore.engine.scaling import scaled_config, set_multiplier
from peftcore.errors import CheckpointError
from peftcore.method import Factors, Method, Model
from peftcore.peft_fields import guarded, peft_version
from peftcore.registry import registry

_OWN = "peftcore"  # in the dictionary's `_metadata`, where PyTorch keeps what it knows of a state


def state_dict(model: nn.Module, adapter: str) -> OrderedDict[str, Tensor]:
    """The tensors of `adapter` under the names that `save` writes them by, copies, on their devices.

    As PyTorch's it has `_metadata`, in which the adapter's config lies for `swap`. Of a sharded model the tensors are
    whole; every rank must then call this.

    Raises:
        PeftcoreError: no such adapter is applied, or adapters are merged.
    """
    engine.refuse_merged(engine.require_state(model), "read an adapter's state")
    engine.call_in(model, adapter)
    engine.refuse_changed(model)
    ranks.reshard(model)
    tensors = {**tensors_on_disk(model, adapter, exported=True), **kept_on_disk(model, adapter)}
    whole = {name: ranks.whole(tensor).clone() for name, tensor in tensors.items()}
    entry = engine.applied(model, adapter)
    with registry.naming(entry.method, "write_tensors"):
        found = OrderedDict(registry.method(entry.method).state.write_tensors(whole, entry.config))
    config = dataclasses.asdict(scaled_config(model, adapter))
    found._metadata = {_OWN: {"method": entry.method, "config": config}}  # type: ignore[attr-defined]
    return found


@engine.alone("swap an adapter's values", base=True)
def swap(
    model: Model, adapter: str, source: str | os.PathLike[str] | Mapping[str, Tensor], *, check_base: bool = True
) -> Model:
    """Give the applied `adapter` the values of another one, in place: a model that is compiled is not compiled again.

    It then computes what the other computes where that is loaded, under the name and in the dtype that it has; a factor
    that `scale` has set is 1 again. Thin products (`factors`) may be of another scale and of a smaller rank, and where
    the other has none B is 0.

    Args:
        source: a folder as `load` takes it, or what `state_dict` gives. Tensors from elsewhere, by their names on disk,
            are taken to be of an adapter with the config that this one has.
        check_base: as for `load`; a state dict has no fingerprint.

    Raises:
        CheckpointError: it is of another method, a larger rank or other modules, or cannot be read. Nothing was
            changed.
    """
    engine.call_in(model, adapter)
    state, entry = engine.require_state(model), engine.applied(model, adapter)
    engine.refuse_merged(state, f"swap '{adapter}'")
    engine.refuse_changed(model)
    ranks.refuse_sharded(model, f"swap '{adapter}'")
    before = entry.multiplier
    set_multiplier(model, adapter, 1.0)
    try:
        _swap(model, adapter, source, check_base)
    except BaseException:
        set_multiplier(model, adapter, before)
        raise
    return model


def _swap(model: nn.Module, adapter: str, source: Any, check_base: bool) -> None:
    entry = engine.applied(model, adapter)
    method, partly_tied, config = registry.method(entry.method), False, entry.config
    if isinstance(source, Mapping):
        where, tensors = Path("state_dict"), dict(source)
        own = getattr(source, "_metadata", {}).get(_OWN)
        if own is not None:
            _refuse_other(method, registry.method(own["method"]), adapter, where)
            config = method.config_class(**own["config"])
        with guarded(method, f"'{where}'"):
            fields = {**method.state.write_config(dataclasses.asdict(config)), "peft_version": peft_version()}
            tensors = dict(method.state.read_tensors(model, tensors, fields))
        if own is None:
            _refuse_other_shapes(model, adapter, tensors)
    else:
        where = Path(source)
        other, config, tensors, metadata = checkpoint.read(where, model, applied=method.name)
        _refuse_other(method, other, adapter, where)
        if check_base:
            refuse_other_base(model, where, metadata, f"peftcore.swap(model, {adapter!r}, ...")
        config, partly_tied = config_on(model, method, config, tensors, metadata), ties_partly(metadata)
    if not _same(config, entry.config):
        tensors = _fitted(model, adapter, method, config, tensors, where)
    fill(model, adapter, tensors, where, partly_tied=partly_tied)


def _refuse_other(method: Method, other: Method, adapter: str, where: Path) -> None:
    if other.name != method.name:
        raise CheckpointError(
            f"'{where}' holds {other.name}, the adapter '{adapter}' is {method.name}. Load it beside, by "
            f"peftcore.load(model, folder, adapter=...), activate that, and remove '{adapter}'"
        )


def _refuse_other_shapes(model: nn.Module, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    for name, here in tensors_on_disk(model, adapter).items():
        if name in tensors and tensors[name].shape != here.shape:
            raise CheckpointError(
                f"'{name}' has shape {list(tensors[name].shape)}, here {list(here.shape)}, and tensors alone do not "
                "say their scale. Give the folder that they lie in, or what peftcore.state_dict gave"
            )


def _same(one: Any, other: Any) -> bool:
    """Say two configs the same? Lists may be in another order."""

    def said(config: Any) -> dict[str, Any]:
        fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        return {n: sorted(map(str, v)) or None if isinstance(v, (list, tuple, set)) else v for n, v in fields.items()}

    return said(one) == said(other)


def _fitted(
    model: nn.Module, adapter: str, method: Method, config: Any, tensors: dict[str, Tensor], where: Path
) -> dict[str, Tensor]:
    """The tensors of an adapter with another config, as the one that stands would have them."""

    def refuse(why: str) -> CheckpointError:
        return CheckpointError(
            f"'{where}' cannot be swapped into '{adapter}': {why}. Beside it: peftcore.load(model, folder, adapter=...)"
        )

    entry = engine.applied(model, adapter)
    if entry.trained:
        raise refuse(f"both train parameters of the base, such as '{entry.trained[0]}', and their configs differ")
    with torch.device("meta"), guarded(method, f"'{where}'"):
        placed = engine.placements_for(model, config, {})
    if any(has_values_of_its_config(placement.adapter) for placement in placed.around):
        with torch.random.fork_rng(devices=[]), guarded(method, f"'{where}'"):
            placed = engine.placements_for(model, config, {})
    wanted = {placement.path: placement.adapter for placement in placed.around}
    standing = dict(engine.adapter_modules(model, adapter))
    more = next((path for path in wanted if path not in standing), None)
    if more is not None or placed.trained:
        raise refuse(f"it has '{more or placed.trained[0]}', and here nothing stands there")
    tensors, rules = dict(tensors), method.state
    for path, placements in entry.placements.items():
        if path not in standing:
            continue
        here, other = standing[path], wanted.get(path)
        own, theirs = _own_factors(here), None if other is None else _own_factors(other)
        thin = own is not None and (other is None or theirs is not None)
        why = difference(here, other, numbers=not thin) if other is not None else None if thin else "it has nothing"
        if why:
            raise refuse(f"at '{path}' it is another: {why}")
        if own is None or not thin:
            continue
        names = {
            id(tensor): rules.tensor_name(each, name) for each in placements for name, tensor in _tensors(each.adapter)
        }
        for number, factors in enumerate(own):
            a, b = names[id(factors.a)], names[id(factors.b)]
            if theirs is None:
                tensors[a], tensors[b] = factors.a.detach(), torch.zeros_like(factors.b)
            elif a in tensors and b in tensors:  # else `fill` says what is missing
                _fit(tensors, a, b, factors, theirs[number], where)
    return tensors


def _fit(tensors: dict[str, Tensor], a: str, b: str, here: Factors, there: Factors, where: Path) -> None:
    """Let the tensors named a and b have the rank of `here`, and B its scale."""
    for name, wanted in ((a, there.a), (b, there.b)):
        if tensors[name].shape != wanted.shape:
            raise CheckpointError(
                f"'{where}': '{name}' has shape {list(tensors[name].shape)}, its config says {list(wanted.shape)}"
            )
    r, most = there.a.shape[0], here.a.shape[0]
    if r > most:
        raise CheckpointError(
            f"'{where}' has rank {r} at '{a}', and what stands there {most}, which cannot grow in place. Apply with "
            f"r={r} or more before the model is compiled, and swap smaller ranks into that"
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


def _own_factors(adapter: Any) -> list[Factors] | None:
    """The factors of an adapter that holds those and nothing else, or None."""
    if not hasattr(adapter, "factors"):
        return None
    factors = list(adapter.factors())
    known = {id(tensor) for each in factors for tensor in (each.a, each.b)}
    return factors if {id(tensor) for _, tensor in _tensors(adapter)} == known else None


def _tensors(adapter: nn.Module) -> list[tuple[str, Tensor]]:
    return [*adapter.named_parameters(), *adapter.named_buffers()]
