"""Errors and warnings that a user can act on, and suggestions for misspelt names."""

from __future__ import annotations

import difflib
import heapq
import warnings
from collections.abc import Iterable

_COMPARED = 1_000  # names with one, which takes 0.1 s
_LONGEST = 200  # characters of a name that is compared


class PeftcoreError(ValueError):
    """Invalid input or state; the message says what is wrong, what was found, and what to do."""


class PluginError(PeftcoreError):
    """A plugin cannot be used: missing, broken, misspelt, or two of one name."""


class CheckpointError(PeftcoreError):
    """An adapter on disk cannot be read, does not fit the model, or could not be written."""


def warn(message: str) -> None:
    """Issue a UserWarning that names the line that calls this function."""
    warnings.warn(message, UserWarning, stacklevel=2)


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """Return a hint such as ` (nearest: 'r', 'use_rslora')`, or an empty string if nothing is similar.

    The work is bounded, since a file may have any number of names of any length: among many names only those of similar
    length are compared, and long ones are skipped.
    """
    if len(name) > _LONGEST:
        return ""
    names = [each for each in known if len(each) <= _LONGEST]
    if len(names) > _COMPARED:
        names = heapq.nsmallest(_COMPARED, names, key=lambda each: abs(len(each) - len(name)))
    found = difflib.get_close_matches(name, names, n=n, cutoff=0.5)
    return f" (nearest: {', '.join(map(repr, found))})" if found else ""
