"""The config of the language model inside a model."""

from __future__ import annotations

from typing import Any


def text_config(config: Any) -> Any:
    """The part of a transformers config that describes the language model, or `config` where it names no part.

    Of two, such as MusicGen's encoder of text and decoder of sound, the one that generates.
    """
    if not hasattr(config, "get_text_config"):
        return config
    try:
        return config.get_text_config()
    except ValueError:  # transformers does not say which of several
        return config.get_text_config(decoder=True)
