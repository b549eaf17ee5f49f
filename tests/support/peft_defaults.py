"""Write `peftcore/plugin/peft_defaults.json` from the installed PEFT: `python -m support.peft_defaults` in tests/."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from peftcore.plugin.peft_fields import COMMON, DEFAULTS, EMPTY


def of_installed() -> dict[str, Any]:
    """What the file should hold."""
    types = {kind.value: _of(config) for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    return {"peft": peft.__version__, "defaults": {name: types[name] for name in sorted(types)}}


def _of(config_class: Any) -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(config_class):
        factory = field.default_factory
        value = field.default if factory is dataclasses.MISSING else factory()
        value = getattr(value, "value", value)  # of an enumeration
        if field.name in COMMON or value in EMPTY or value is dataclasses.MISSING or dataclasses.is_dataclass(value):
            continue  # runtime settings are dataclasses, and never written
        found[field.name] = value
    return dict(sorted(found.items()))


def as_text(content: dict[str, Any]) -> str:
    """A line for each type."""
    lines = [f'    "{name}": {json.dumps(values)}' for name, values in content["defaults"].items()]
    return f'{{\n  "peft": "{content["peft"]}",\n  "defaults": {{\n' + ",\n".join(lines) + "\n  }\n}\n"


if __name__ == "__main__":
    DEFAULTS.write_text(as_text(of_installed()), encoding="utf-8")
