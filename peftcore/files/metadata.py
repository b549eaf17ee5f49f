"""What peftcore writes into the metadata of an adapter's tensors, which other readers ignore."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftcore.errors import CheckpointError
from peftcore.plugin.safe_reading import TENSORS, parse_json
from peftcore.plugin.validation import shown

VERSION = "peftcore_version"  # of the peftcore that wrote the file; only its files have it
BASE = "peftcore_base"  # the fingerprint of the base
METHOD = "peftcore_method"  # the adapter's method
PLUGIN = "peftcore_plugin"  # `DISTRIBUTION VERSION` of the plugin that wrote the file
OWN_FIELDS = "peftcore_fields"  # fields of the method's config that PEFT does not know
TIED = "peftcore_tied"  # whether parameters tied in the base are trained tied
MULTIPLIER = "peftcore_multiplier"  # the factor set by `scale`
TOGETHER = "peftcore_together"  # the adapters that were saved together
PARTS = "peftcore_parts"  # in a file for several models: {part: metadata of its tensors}

Metadata = Mapping[str, str]


def own_fields(folder: Path, metadata: Metadata) -> dict[str, Any]:
    """Return the config fields that a file has in its metadata.

    Raises:
        CheckpointError: they are not a table of fields.
    """
    file = f"{folder / TENSORS}: {OWN_FIELDS}"
    fields = parse_json(metadata.get(OWN_FIELDS, "{}").encode(errors="surrogatepass"), file)
    if not isinstance(fields, dict):
        raise CheckpointError(f"'{file}' must be a table of fields, found {shown(fields)}")
    return fields


def ties_partly(metadata: Metadata) -> bool:
    """Return whether the file is from a peftcore that wrote tied parameters under one of their names."""
    return VERSION in metadata and TIED not in metadata
