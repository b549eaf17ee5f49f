"""The config of the language model inside a model."""

from __future__ import annotations

from typing import Any


def text_config(config: Any) -> Any:
    """Return the part of a transformers config that describes the language model, or `config` if it has no parts.

    Of two, such as MusicGen's encoder of text and decoder of sound, the one that generates.
    """
    if not hasattr(config, "get_text_config"):
        return config
    try:
        return config.get_text_config()
    except ValueError:  # ambiguous: there are several
        return config.get_text_config(decoder=True)
