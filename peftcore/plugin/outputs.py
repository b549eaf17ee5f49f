"""Outputs of modules: a tensor, or several in a tuple, list or dict. Adapters change the first value."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor

from peftcore.errors import PeftcoreError


def first_of(output: Any) -> Any:
    """Return the first value of an output with several values, or the output itself."""
    if isinstance(output, (tuple, list)) and output:
        return output[0]
    if isinstance(output, dict) and output:
        return next(iter(output.values()))
    return output


def with_first(output: Any, first: Any) -> Any:
    """Return a copy of `output`, with the same type and another first value.

    Raises:
        PeftcoreError: the first value is a model's loss, which would not reflect the change.
    """
    if _is_loss(output):
        raise PeftcoreError(
            "an adapter after the whole model would change its loss, not its logits. Call the model without labels "
            "and compute the loss from its logits, or place the adapter after the output head"
        )
    if isinstance(output, tuple) and output:
        values = (first, *output[1:])
        return type(output)(*values) if hasattr(output, "_fields") else values
    if isinstance(output, list) and output:
        return [first, *output[1:]]
    if isinstance(output, dict) and output:
        result = copy.copy(output)
        result[next(iter(output))] = first
        return result
    return first


def _is_loss(output: Any) -> bool:
    """Return whether an output's first value is a loss: by its name, or in a tuple as a zero-dimensional tensor."""
    if isinstance(output, dict):
        return next(iter(output), None) == "loss"
    return isinstance(output, tuple) and len(output) > 1 and isinstance(output[0], Tensor) and not output[0].dim()


def tensors_of(output: Any) -> Iterator[Tensor]:
    """Yield the tensors in an output, at any depth."""
    if isinstance(output, Tensor):
        yield output
        return
    parts: Sequence[Any] = ()
    if isinstance(output, dict):
        parts = list(output.values())
    elif isinstance(output, (tuple, list)):
        parts = output
    elif is_dataclass(output):
        parts = list(vars(output).values())
    for part in parts:
        yield from tensors_of(part)
