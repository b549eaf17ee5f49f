"""The errors that a user can act on, and the search for the name that was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PeftcoreError(ValueError):
    """Something given to peftcore was wrong; the message says what, what was found, and what to do."""


class PluginError(PeftcoreError):
    """A plugin cannot be used: missing, broken, misspelt, or two of one name."""


class CheckpointError(PeftcoreError):
    """An adapter on disk cannot be read, does not fit the model, or could not be written."""


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """A hint such as ` (nearest: 'r', 'use_rslora')`, or an empty string where nothing is near."""
    found = difflib.get_close_matches(name, list(known), n=n, cutoff=0.5)
    return f" (nearest: {', '.join(map(repr, found))})" if found else ""
