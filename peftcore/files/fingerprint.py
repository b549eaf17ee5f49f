"""Fingerprint of the base: shapes and a few values of its tensors.

It prevents loading an adapter onto another model, or onto one with a re-initialized head or vocabulary. The same model
in another dtype matches, since values are compared within 2 %; another model of the same shape does not. Quantized
weights have no values to sample and are skipped.

    {"version": 2, "tensors": {name: [shape, values]}}      values: 4 spread over the tensor and its last 4; empty for
                                                            sharded tensors that were not sampled
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
_SAMPLED_TENSORS = 16
_SPREAD_VALUES = _LAST_VALUES = 4
_TOLERANCE = 0.02


def fingerprint(tensors: Mapping[str, Tensor], important: Collection[str] = ()) -> str:
    """Return JSON with the shapes and some values of all floating-point tensors.

    Collective if tensors are sharded. In that case only 16 tensors and the `important` ones are sampled, because each
    sampled tensor is all-gathered.
    """
    names = _with_values(tensors)
    sampled_names: Collection[str] = names
    is_sharded = sharded.any_shards([tensors[name] for name in names])
    if is_sharded:
        sampled_names = {*names[:: -(-len(names) // _SAMPLED_TENSORS)], *important}
    shapes = {name: sharded.shape_of(tensors[name]) if is_sharded else tensors[name].shape for name in names}
    values = _samples(
        {name: (tensors[name], _positions(shapes[name].numel())) for name in names if name in sampled_names}
    )
    records: dict[str, Any] = {}
    for name in names:
        records[name] = list(shapes[name]), list(map(float, map("{:.5g}".format, values.get(name, ()))))
    return json.dumps({"version": _VERSION, "tensors": records}, separators=(",", ":"))


def difference(tensors: Mapping[str, Tensor], expected: str) -> str | None:
    """Return how `tensors` differ from the fingerprint `expected`, or None.

    Raises:
        CheckpointError: the fingerprint is invalid.
    """
    records = _parse(expected)
    with_values, samples_to_read = {*_with_values(tensors)}, dict[str, tuple[Tensor, tuple[int, ...]]]()
    for name, (shape, values) in records.items():
        tensor = tensors.get(name)
        if tensor is None:
            return f"it has no parameter '{name}'"
        if name not in with_values:
            continue
        shape_here = getattr(tensor, "ds_shape", tensor.shape)  # `sharded.shape_of`
        if list(shape_here) != shape:
            return f"'{name}' has shape {list(shape_here)}, but {shape} in the adapter's base"
        if not values:
            continue
        positions = _positions(math.prod(shape_here))
        if len(values) != len(positions):
            return f"'{name}' has {len(positions)} sampled values, but {len(values)} in the adapter's base"
        samples_to_read[name] = tensor, positions
    for name, values_here in _samples(samples_to_read).items():
        values_of_base = records[name][1]
        size = math.hypot(*values_of_base)
        if math.isfinite(size):
            error = math.dist(values_here, values_of_base) / max(size, 1e-12)
        else:
            error = _error(values_here, values_of_base)
        if not error <= _TOLERANCE:  # also for NaN
            return f"the values of '{name}' differ by {100 * error:.0f} %"
    return None


def _with_values(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of floating-point tensors that are neither meta tensors nor quantized."""
    names: list[str] = []
    for name, tensor in tensors.items():
        has_values = tensor.is_floating_point() and not tensor.is_meta
        if has_values and (type(tensor) is torch.nn.Parameter or not is_wrapped(tensor)):
            names.append(name)
    return names


def _parse(text: str) -> dict[str, tuple[list[int], list[float]]]:
    """Parse a fingerprint, which may come from an untrusted file, into {name: (shape, values)}."""
    try:
        record = json.loads(text)
        version = record["version"]
        tensors = {name: (list(shape), list(map(float, values))) for name, (shape, values) in record["tensors"].items()}
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError, RuntimeError) as error:
        raise CheckpointError(f"the fingerprint of the base (peftcore_base) cannot be read: {error!r}") from error
    if version != _VERSION:
        raise CheckpointError(
            f"the fingerprint of the base (peftcore_base) has version {shown(version)}, but this peftcore reads "
            f"version {_VERSION}. Upgrade peftcore, or skip the check of the base: check_base=False"
        )
    return tensors


def _error(values: list[float], expected: list[float]) -> float:
    """Return |values - expected| / |expected| where some values are infinite; equal infinities match."""
    distance = math.hypot(*(0.0 if one == other else one - other for one, other in zip(values, expected, strict=True)))
    return distance / max(math.hypot(*filter(math.isfinite, expected)), 1e-12)


@lru_cache(1024)
def _positions(count: int) -> tuple[int, ...]:
    positions = [i * count // _SPREAD_VALUES for i in range(_SPREAD_VALUES)]
    return tuple(sorted({*positions, *range(max(0, count - _LAST_VALUES), count)} - {count}))


def _samples(positions_by_name: Mapping[str, tuple[Tensor, tuple[int, ...]]]) -> dict[str, list[float]]:
    """Return values of tensors at positions. Values of the same dtype and device are fetched in one transfer."""
    is_sharded = sharded.any_shards([tensor for tensor, _ in positions_by_name.values()])
    samples_by_kind: dict[Any, dict[str, Tensor]] = {}
    for name, (tensor, positions) in positions_by_name.items():
        flat = (sharded.whole(tensor) if is_sharded else tensor.detach()).reshape(-1)
        index = _index(positions)
        sample = flat.index_select(0, index if flat.is_cpu else index.to(flat.device))
        samples_by_kind.setdefault((sample.dtype, sample.device), {})[name] = sample
    values_by_name: dict[str, list[float]] = {}
    for samples in samples_by_kind.values():
        values = torch.cat(list(samples.values())).float().tolist()
        end = 0
        for name, sample in samples.items():
            start, end = end, end + len(sample)
            values_by_name[name] = values[start:end]
    return {name: values_by_name[name] for name in positions_by_name}


@lru_cache(1024)  # cached because many layers have the same size
def _index(positions: tuple[int, ...]) -> Tensor:
    return torch.tensor(positions, dtype=torch.long, device="cpu")
