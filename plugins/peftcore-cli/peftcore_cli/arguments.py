"""Checks of option values for all commands, and error messages for OSErrors."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftcore.errors import PeftcoreError

_LARGEST = 1 << 62  # integers count steps and tokens, and sums of them must fit into 64 bits
_SEEDS = 1 << 32
_WITHOUT_A_FILE = (errno.ENOSPC, errno.EDQUOT)


def check(options: Mapping[str, Any]) -> None:
    """Raise a PeftcoreError for values that no command can use.

    These are numbers that are not finite or too large, seeds outside 32 bits, and text that cannot be a file name.
    """
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, float) and not math.isfinite(item):
                raise PeftcoreError(f"{option} must be a finite number, found {item}")
            if isinstance(item, int) and not -_LARGEST < item < _LARGEST:
                raise PeftcoreError(
                    f"{option} must be below {_LARGEST:.2g}, found a number with {item.bit_length()} bits"
                )
            if isinstance(item, (str, Path)):
                _check_text(option, str(item))
        if name == "seed" and isinstance(value, int) and not 0 <= value < _SEEDS:
            raise PeftcoreError(f"--seed must be between 0 and {_SEEDS - 1}, found {value}")


def _check_text(option: str, text: str) -> None:
    if "\0" in text:
        raise PeftcoreError(f"{option} contains a NUL character. Remove it")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise PeftcoreError(
            f"{option} contains an unpaired surrogate, which is not valid Unicode: {text[:80]!a}. Remove it"
        ) from None


def refusal(error: OSError) -> str | None:
    """Return a message for an OSError about a file, or None for any other OSError."""
    if error.errno == errno.EPIPE or (error.filename is None and error.errno not in _WITHOUT_A_FILE):
        return None
    if error.filename is None:
        return f"{error.strerror}. Free some space, or pass another folder"
    name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else str(error.filename)
    shown = name if len(name) <= 200 else f"{name[:200]}..."
    return f"cannot use '{shown}': {error.strerror or error}. Pass another path"
