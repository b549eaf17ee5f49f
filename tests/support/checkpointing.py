"""Gradient checkpointing under the name that the installed release of transformers has for it."""

from __future__ import annotations

from typing import Any


def enable_checkpointing(model: Any, options: dict[str, Any] | None = None) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)
