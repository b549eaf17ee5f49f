"""Checks of options shared by all commands, and messages for errors of the operating system."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftcore.errors import PeftcoreError

_LARGEST = 1 << 62  # whole numbers are counts of steps and tokens, which are added up
_SEEDS = 1 << 32
_WITHOUT_A_FILE = (errno.ENOSPC, errno.EDQUOT)


def check(options: Mapping[str, Any]) -> None:
    """Raise a PeftcoreError for a value of an option that no command can use.

    These are numbers that are not finite or too large, seeds outside of 32 bits, and text that cannot name a file.
    """
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(each, float) and not math.isfinite(each):
                raise PeftcoreError(f"{option} must be a finite number, found {each}")
            if isinstance(each, int) and not -_LARGEST < each < _LARGEST:
                raise PeftcoreError(
                    f"{option} must be below {_LARGEST:.2g}, found a number of {each.bit_length()} bits"
                )
            if isinstance(each, (str, Path)):
                _check_text(option, str(each))
        if name == "seed" and isinstance(value, int) and not 0 <= value < _SEEDS:
            raise PeftcoreError(f"--seed must be in 0 to {_SEEDS - 1}, found {value}")


def _check_text(option: str, text: str) -> None:
    if "\0" in text:
        raise PeftcoreError(f"{option} contains a NUL character, which no name of a file and no text may")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise PeftcoreError(f"{option} contains half a surrogate pair, which is not text: {text[:80]!a}") from None


def refusal(error: OSError) -> str | None:
    """Return a message for an error of the operating system about a file; None for other errors."""
    if error.errno == errno.EPIPE or (error.filename is None and error.errno not in _WITHOUT_A_FILE):
        return None
    if error.filename is None:
        return f"{error.strerror}. Make room, or give another folder"
    name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else str(error.filename)
    shown = name if len(name) <= 200 else f"{name[:200]}..."
    return f"'{shown}' cannot be used: {error.strerror or error}. Give another path"
