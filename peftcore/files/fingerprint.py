"""Fingerprint of the base: shapes and a few values of its tensors.

It keeps an adapter from being loaded onto another model, or onto one with a re-initialised head or vocabulary. Two
dtypes of one model match (values are compared within 2 %), another model of the same shape does not. Quantized weights,
which have no values to sample, are skipped.

    {"version": 2, "tensors": {name: [shape, values]}}      values: 4 spread over the tensor and its last 4; none, if
                                                            the tensor was sharded and not among those chosen
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from peftcore.errors import CheckpointError
from peftcore.plugin import sharded
from peftcore.plugin.layers import is_wrapped
from peftcore.plugin.validation import shown

_VERSION = 2
_GATHERED = 16
_SPREAD = _LAST = 4
_TOLERANCE = 0.02


def fingerprint(tensors: Mapping[str, Tensor], important: Collection[str] = ()) -> str:
    """Return JSON with the shapes and some values of all floating-point tensors.

    Collective if tensors are sharded; it then has values of 16 of them and of the `important` ones only, since each is
    gathered whole.
    """
    names = _with_values(tensors)
    chosen: Collection[str] = names
    parts = sharded.any_shards([tensors[name] for name in names])
    if parts:
        chosen = {*names[:: -(-len(names) // _GATHERED)], *important}
    shapes = {name: sharded.shape_of(tensors[name]) if parts else tensors[name].shape for name in names}
    values = _samples({name: (tensors[name], _positions(shapes[name].numel())) for name in names if name in chosen})
    recorded: dict[str, Any] = {}
    for name in names:
        recorded[name] = list(shapes[name]), list(map(float, map("{:.5g}".format, values.get(name, ()))))
    return json.dumps({"version": _VERSION, "tensors": recorded}, separators=(",", ":"))


def difference(tensors: Mapping[str, Tensor], expected: str) -> str | None:
    """Return how `tensors` differ from the base of the fingerprint, or None.

    Raises:
        CheckpointError: the fingerprint is invalid.
    """
    recorded = _parsed(expected)
    with_values, sampled = {*_with_values(tensors)}, dict[str, tuple[Tensor, tuple[int, ...]]]()
    for name, (shape, values) in recorded.items():
        tensor = tensors.get(name)
        if tensor is None:
            return f"it has no parameter '{name}'"
        if name not in with_values:
            continue
        shape_here = getattr(tensor, "ds_shape", tensor.shape)  # `sharded.shape_of`
        if list(shape_here) != shape:
            return f"'{name}' has shape {list(shape_here)}, the adapter's base {shape}"
        if not values:
            continue
        positions = _positions(math.prod(shape_here))
        if len(values) != len(positions):
            return f"'{name}' has {len(positions)} sampled values, the adapter's base {len(values)}"
        sampled[name] = tensor, positions
    for name, values_here in _samples(sampled).items():
        values_of_base = recorded[name][1]
        size = math.hypot(*values_of_base)
        if math.isfinite(size):
            error = math.dist(values_here, values_of_base) / max(size, 1e-12)
        else:
            error = _error(values_here, values_of_base)
        if not error <= _TOLERANCE:  # also for NaN
            return f"the values of '{name}' differ by {100 * error:.0f} %"
    return None


def _with_values(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of floating-point tensors that have values here and are not quantized."""
    names: list[str] = []
    for name, tensor in tensors.items():
        has_values = tensor.is_floating_point() and not tensor.is_meta
        if has_values and (type(tensor) is torch.nn.Parameter or not is_wrapped(tensor)):
            names.append(name)
    return names


def _parsed(text: str) -> dict[str, tuple[list[int], list[float]]]:
    """Return {name: (shape, values)} of a fingerprint, which may come from an untrusted file."""
    try:
        record = json.loads(text)
        version = record["version"]
        tensors = {name: (list(shape), list(map(float, values))) for name, (shape, values) in record["tensors"].items()}
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError, RuntimeError) as error:
        raise CheckpointError(f"the fingerprint of the base (peftcore_base) cannot be read: {error!r}") from error
    if version != _VERSION:
        raise CheckpointError(
            f"the fingerprint of the base (peftcore_base) has version {shown(version)}, but this peftcore reads "
            f"{_VERSION}. Upgrade peftcore, or load without it: check_base=False"
        )
    return tensors


def _error(values: list[float], expected: list[float]) -> float:
    """Return |found - wanted| / |wanted| where some values are infinite; equal ones match."""
    away = math.hypot(*(0.0 if one == other else one - other for one, other in zip(values, expected, strict=True)))
    return away / max(math.hypot(*filter(math.isfinite, expected)), 1e-12)


@lru_cache(1024)
def _positions(count: int) -> tuple[int, ...]:
    spread = [i * count // _SPREAD for i in range(_SPREAD)]
    return tuple(sorted({*spread, *range(max(0, count - _LAST), count)} - {count}))


def _samples(chosen: Mapping[str, tuple[Tensor, tuple[int, ...]]]) -> dict[str, list[float]]:
    """Return the values of tensors at positions; those of one dtype and device are fetched together."""
    parts = sharded.any_shards([tensor for tensor, _ in chosen.values()])
    kinds: dict[Any, dict[str, Tensor]] = {}
    for name, (tensor, positions) in chosen.items():
        flat = (sharded.whole(tensor) if parts else tensor.detach()).reshape(-1)
        index = _index(positions)
        sample = flat.index_select(0, index if flat.is_cpu else index.to(flat.device))
        kinds.setdefault((sample.dtype, sample.device), {})[name] = sample
    lists: dict[str, list[float]] = {}
    for samples in kinds.values():
        values = torch.cat(list(samples.values())).float().tolist()
        end = 0
        for name, sample in samples.items():
            begin, end = end, end + len(sample)
            lists[name] = values[begin:end]
    return {name: lists[name] for name in chosen}


@lru_cache(1024)  # many layers have the same size
def _index(positions: tuple[int, ...]) -> Tensor:
    return torch.tensor(positions, dtype=torch.long, device="cpu")
