"""What Hugging Face PEFT fills a config with where its user says nothing, by peft_type: `peft_defaults.json`.

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
    """The PEFT that the defaults are of."""
    return str(_content()["peft"])


def defaults(peft_type: str) -> dict[str, Any]:
    """{field: PEFT's default} where that is not empty; nothing for a type that PEFT does not have."""
    return dict(_content()["defaults"].get(peft_type, {}))


def says_something(peft_type: str, name: str, value: Any) -> bool:
    """Is the value of a field another than PEFT's default, and more than nothing?

    None, and where PEFT's default is empty any empty value, say nothing. `False` or 0 in place of a default that is
    not is something.
    """
    known = defaults(peft_type)
    if name in known:
        return value is not None and value != known[name]
    return value not in EMPTY
