"""Fingerprint of the base: shapes and a few values of its tensors.

It keeps an adapter from being loaded onto another model, or onto one with a re-initialised head or vocabulary. Two
dtypes of one model match (values are compared within 2 %), another model of the same shape does not. Quantized weights,
which have no values to sample, are skipped.

    {"version": 2, "tensors": {name: [shape, values]}}      values: 4 spread over the tensor and its last 4; none, if
                                                            the tensor was sharded and not among those chosen
    {name: [shape, values]}                                 version 1: 16 tensors, 32 values each
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from peftcore import ranks
from peftcore.errors import CheckpointError
from peftcore.layers import is_wrapped

_VERSION = 2
_GATHERED = 16
_SPREAD = _LAST = 4
_TOLERANCE = 0.02


def fingerprint(tensors: dict[str, Tensor], important: Collection[str] = ()) -> str:
    """Return JSON with the shapes and some values of all floating-point tensors.

    Collective if tensors are sharded; it then has values of 16 of them and of the `important` ones only, since each is
    gathered whole.
    """
    names = [name for name, t in tensors.items() if _has_values(t)]
    chosen: Collection[str] = names
    if any(ranks.is_part(tensors[name]) for name in names):
        chosen = {*names[:: -(-len(names) // _GATHERED)], *important}
    shapes = {name: ranks.shape_of(tensors[name]) for name in names}
    sampled = {name: _sample(tensors[name], _positions(shapes[name].numel())) for name in names if name in chosen}
    values = dict(_as_lists(sampled))
    found = {name: [list(shapes[name]), _rounded(values.get(name, ()))] for name in names}
    return json.dumps({"version": _VERSION, "tensors": found}, separators=(",", ":"))


def difference(tensors: dict[str, Tensor], expected: str) -> str | None:
    """Return how `tensors` differ from the base of the fingerprint, or None.

    Raises:
        CheckpointError: the fingerprint is invalid.
    """
    record = _parsed(expected)
    positions_of = _positions if record["version"] == _VERSION else _positions_of_version_1
    sampled: dict[str, Tensor] = {}
    for name, (shape, values) in record["tensors"].items():
        tensor = tensors.get(name)
        if tensor is not None and not _has_values(tensor):
            continue
        if tensor is None:
            return f"it has no parameter '{name}'"
        here = ranks.shape_of(tensor)
        if list(here) != shape:
            return f"'{name}' has shape {list(here)}, the adapter's base {shape}"
        if not values:
            continue
        positions = positions_of(here.numel())
        if len(values) != len(positions):
            return f"'{name}' has {len(positions)} sampled values, the adapter's base {len(values)}"
        sampled[name] = _sample(tensor, positions)
    for name, found in _as_lists(sampled):
        error = _error(found, record["tensors"][name][1])
        if not error <= _TOLERANCE:  # also for NaN
            return f"the values of '{name}' differ by {100 * error:.0f} %"
    return None


def _has_values(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not tensor.is_meta and not is_wrapped(tensor)


def _parsed(text: str) -> dict[str, Any]:
    """Parse and check a fingerprint, which may come from an untrusted file."""
    try:
        record = json.loads(text)
        if not isinstance(record.get("version"), int):
            record = {"version": 1, "tensors": record}
        tensors = {
            name: (list(shape), [float(v) for v in values]) for name, (shape, values) in record["tensors"].items()
        }
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError, RuntimeError) as error:
        raise CheckpointError(f"the fingerprint of the base (peftcore_base) cannot be read: {error!r}") from error
    if record["version"] > _VERSION:
        raise CheckpointError(
            f"the fingerprint of the base (peftcore_base) has version {record['version']}, but this peftcore reads "
            f"{_VERSION}. Upgrade peftcore"
        )
    return {"version": record["version"], "tensors": tensors}


def _error(found: list[float], wanted: list[float]) -> float:
    """Return |found - wanted| / |wanted|; infinite values match each other. Tensors would take ten times as long."""
    away = math.hypot(*(0.0 if one == other else one - other for one, other in zip(found, wanted, strict=True)))
    return away / max(math.hypot(*filter(math.isfinite, wanted)), 1e-12)


@lru_cache(1024)
def _positions(count: int) -> tuple[int, ...]:
    spread = [i * count // _SPREAD for i in range(_SPREAD)]
    return tuple(sorted({*spread, *range(max(0, count - _LAST), count)} - {count}))


def _positions_of_version_1(count: int) -> tuple[int, ...]:
    return tuple(i * max(1, count // 32) for i in range(min(32, count)))


def _sample(tensor: Tensor, positions: tuple[int, ...]) -> Tensor:
    """Return the values at those positions, on the tensor's device and in its dtype."""
    flat = ranks.whole(tensor).reshape(-1)
    index = _index(positions)
    return flat.index_select(0, index if flat.is_cpu else index.to(flat.device))


def _as_lists(samples: dict[str, Tensor]) -> Iterator[tuple[str, list[float]]]:
    """Yield the values of each tensor; those of one dtype and device are fetched together."""
    kinds: dict[Any, list[str]] = {}
    for name, sample in samples.items():
        kinds.setdefault((sample.dtype, sample.device), []).append(name)
    for names in kinds.values():
        values = torch.cat([samples[name] for name in names]).float().tolist()
        end = 0
        for name in names:
            begin, end = end, end + len(samples[name])
            yield name, values[begin:end]


@lru_cache(1024)  # many layers have the same size
def _index(positions: tuple[int, ...]) -> Tensor:
    return torch.tensor(positions, dtype=torch.long, device="cpu")


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
