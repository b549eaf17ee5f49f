"""Keys that peftcore writes into the metadata of an adapter's tensors. Other libraries ignore them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftcore.errors import CheckpointError
from peftcore.plugin.safe_reading import TENSORS, parse_json
from peftcore.plugin.validation import shown

VERSION = "peftcore_version"  # version of the peftcore that wrote the file; files of other libraries lack it
BASE = "peftcore_base"  # fingerprint of the base
METHOD = "peftcore_method"  # name of the adapter's method
PLUGIN = "peftcore_plugin"  # `DISTRIBUTION VERSION` of the plugin that wrote the file
OWN_FIELDS = "peftcore_fields"  # config fields of the method that PEFT does not have
TIED = "peftcore_tied"  # whether parameters tied in the base are trained as one parameter
MULTIPLIER = "peftcore_multiplier"  # multiplier set by `scale`
TOGETHER = "peftcore_together"  # names of the adapters that were saved together
PARTS = "peftcore_parts"  # in a file for several models: {part: metadata of its tensors}

Metadata = Mapping[str, str]


def own_fields(folder: Path, metadata: Metadata) -> dict[str, Any]:
    """Return the config fields in a file's metadata.

    Raises:
        CheckpointError: the metadata is not a JSON object.
    """
    file = f"{folder / TENSORS}: {OWN_FIELDS}"
    fields = parse_json(metadata.get(OWN_FIELDS, "{}").encode(errors="surrogatepass"), file)
    if not isinstance(fields, dict):
        raise CheckpointError(f"'{file}' must be a table of fields, found {shown(fields)}")
    return fields


def ties_partly(metadata: Metadata) -> bool:
    """Return whether the file was written by an early peftcore, which stored tied parameters under only one name."""
    return VERSION in metadata and TIED not in metadata
