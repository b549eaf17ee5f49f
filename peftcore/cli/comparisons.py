"""Tasks that compare the model with a reference, as it was before: each a module with the same functions."""

from __future__ import annotations

from typing import Any

from peftcore.cli import data, preferences, unpaired


def of(task: str) -> Any:
    """Return the module of a task: `encode`, `lengths`, `likelihoods`, `measure`, `as_texts` and `BETA`."""
    return {data.PREFERENCES: preferences, data.UNPAIRED: unpaired}[task]
