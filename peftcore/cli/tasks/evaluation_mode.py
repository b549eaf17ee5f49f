"""Models in evaluation mode, and examples in batches: what every measurement on held-out examples shares."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode without gradients, and back into the mode that it had."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def batched(examples: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield `examples` in their order, `size` at a time."""
    for start in range(0, len(examples), size):
        yield examples[start : start + size]
