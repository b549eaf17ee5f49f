"""Configs of methods by the name of the method."""

from __future__ import annotations

import dataclasses
from typing import Any

from peftcore.errors import PeftcoreError, nearest
from peftcore.plugin.peft_fields import why_unknown
from peftcore.plugin.registry import registry
from peftcore.plugin.validation import check_types


def config(method: str, /, **fields: Any) -> Any:
    """Return a config of an installed method, for `apply` or the `peft_config` of TRL's trainers.

    Args:
        method: name of the method.
        fields: fields of its config; the others have their defaults.

    Raises:
        PluginError: the method is not installed or broken.
        PeftcoreError: a field does not exist, is missing, or has a wrong value.
    """
    config_class = registry.method(method).config_class
    known = [field.name for field in dataclasses.fields(config_class)]
    for name, value in fields.items():
        if name not in known:
            raise PeftcoreError(
                f"{config_class.__name__} has no field '{name}'{nearest(name, known)}"
                f"{why_unknown(registry.method(method), name, value)}. Its fields: {', '.join(known)}"
            )
    check_types(config_class, fields)
    try:
        return config_class(**fields)
    except TypeError as error:
        raise PeftcoreError(f"{config_class.__name__}: {error}") from error
