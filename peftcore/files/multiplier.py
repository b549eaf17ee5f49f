"""Storage of the multiplier set by `scale`.

The config on disk describes the scaled adapter, so that any library can read it. The file's metadata has the multiplier
and the unscaled fields, from which `load` restores the unscaled adapter and its multiplier.

    {"multiplier": 0.5, "fields": {name: value without the multiplier}}
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


def multiplier_metadata(model: nn.Module, adapter: str) -> dict[str, str]:
    """Return the metadata that stores an applied adapter's multiplier; empty if it is 1."""
    entry = engine.applied(model, adapter)
    if entry.multiplier == 1.0:
        return {}
    config, scaled_fields = entry.config, scaled_config(model, adapter)
    names = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(scaled_fields, f.name)]
    fields = {name: getattr(config, name) for name in names}
    return {MULTIPLIER: json.dumps({"multiplier": entry.multiplier, "fields": fields})}


def read_multiplier(metadata: dict[str, str]) -> float:
    """Return the multiplier in the metadata, by default 1.

    Raises:
        CheckpointError: the multiplier is not a finite number.
    """
    return _parse(metadata)[0]


def remove_multiplier(method: Method, config: Any, metadata: dict[str, str]) -> tuple[Any, float]:
    """Return (config without the multiplier, multiplier), or (unchanged config, 1) if the config was edited."""
    multiplier, fields = _parse(metadata)
    if multiplier == 1.0 or method.state.peft.scaled is None:
        return config, 1.0
    try:
        unscaled = dataclasses.replace(config, **fields)
        rescaled = method.state.peft.scaled(unscaled, multiplier)
    except (TypeError, PeftcoreError) as error:
        raise CheckpointError(f"the adapter's factor ({MULTIPLIER}) cannot be read: {error}") from error
    is_unedited = all(getattr(rescaled, name) == getattr(config, name) for name in fields)
    return (unscaled, multiplier) if is_unedited else (config, 1.0)


def _parse(metadata: dict[str, str]) -> tuple[float, dict[str, Any]]:
    if MULTIPLIER not in metadata:
        return 1.0, {}
    try:
        record = json.loads(metadata[MULTIPLIER])
        multiplier, fields = float(record["multiplier"]), dict(record["fields"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"the adapter's factor ({MULTIPLIER}) cannot be read: {error!r}") from error
    if not math.isfinite(multiplier):
        raise CheckpointError(
            f"the adapter's factor ({MULTIPLIER}) is {multiplier}, which is not finite. Save the adapter again"
        )
    return multiplier, fields
