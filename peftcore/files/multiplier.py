"""Storage of the factor set by `scale`.

The config on disk is that of the scaled adapter, which any library reads. The file's metadata has the factor and the
fields without it, from which `load` restores both.

    {"multiplier": 0.5, "fields": {name: value without the factor}}
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from torch import nn

from peftcore import engine
from peftcore.engine.scaling import scaled_config
from peftcore.errors import CheckpointError, PeftcoreError
from peftcore.files.metadata import MULTIPLIER
from peftcore.plugin.method import Method


def in_metadata(model: nn.Module, adapter: str) -> dict[str, str]:
    """Return the metadata for an applied adapter's factor; empty if it is 1."""
    entry = engine.applied(model, adapter)
    if entry.multiplier == 1.0:
        return {}
    config, scaled = entry.config, scaled_config(model, adapter)
    names = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(scaled, f.name)]
    fields = {name: getattr(config, name) for name in names}
    return {MULTIPLIER: json.dumps({"multiplier": entry.multiplier, "fields": fields})}


def multiplier_in(metadata: dict[str, str]) -> float:
    """Return the factor in the metadata, or 1.

    Raises:
        CheckpointError: it is not a number.
    """
    return _parsed(metadata)[0]


def without(method: Method, config: Any, metadata: dict[str, str]) -> tuple[Any, float]:
    """Return (config without the factor, factor), or the config as it is and 1 if it was edited."""
    multiplier, fields = _parsed(metadata)
    if multiplier == 1.0 or method.state.peft.scaled is None:
        return config, 1.0
    try:
        unscaled = dataclasses.replace(config, **fields)
        scaled = method.state.peft.scaled(unscaled, multiplier)
    except (TypeError, PeftcoreError) as error:
        raise CheckpointError(f"the adapter's factor ({MULTIPLIER}) cannot be read: {error}") from error
    as_it_was = all(getattr(scaled, name) == getattr(config, name) for name in fields)
    return (unscaled, multiplier) if as_it_was else (config, 1.0)


def _parsed(metadata: dict[str, str]) -> tuple[float, dict[str, Any]]:
    if MULTIPLIER not in metadata:
        return 1.0, {}
    try:
        record = json.loads(metadata[MULTIPLIER])
        multiplier, fields = float(record["multiplier"]), dict(record["fields"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"the adapter's factor ({MULTIPLIER}) cannot be read: {error!r}") from error
    if not math.isfinite(multiplier):
        raise CheckpointError(f"the adapter's factor ({MULTIPLIER}) is {multiplier}")
    return multiplier, fields
