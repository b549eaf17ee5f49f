"""Defaults of Hugging Face PEFT's configs by peft_type, from `peft_defaults.json`.

`python tests/peft_defaults.py` writes the file from the installed PEFT. Values that are empty anyway are left out.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

FILE = files(__package__) / "peft_defaults.json"  # may be in a zip file
EMPTY: tuple[Any, ...] = (None, False, "", [], {}, 0)


@cache
def _content() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def peft_version() -> str:
    """Return the version of PEFT that the defaults come from."""
    return str(_content()["peft"])


def defaults(peft_type: str) -> dict[str, Any]:
    """Return {field: PEFT's default} for non-empty defaults; nothing for a type that PEFT does not have."""
    return dict(_content()["defaults"].get(peft_type, {}))


def is_of_peft(peft_type: str) -> bool:
    """Return whether PEFT has adapters of this type."""
    return peft_type in _content()["defaults"]


def says_something(peft_type: str, name: str, value: Any) -> bool:
    """Return whether the value of a field differs from PEFT's default and is not empty.

    None, and any empty value if PEFT's default is empty, do not count. `False` or 0 count if the default is not empty.
    """
    known = defaults(peft_type)
    if name in known:
        return value is not None and value != known[name]
    return value not in EMPTY
