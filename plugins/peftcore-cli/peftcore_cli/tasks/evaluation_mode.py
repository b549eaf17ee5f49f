"""Evaluation mode and batching for evaluation on held-out examples."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import nn

from peftcore.plugin import evaluation_mode

T = TypeVar("T")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block, put `model` into evaluation mode without gradients."""
    with evaluation_mode(model), torch.no_grad():
        yield


def batched(examples: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield batches of `size` examples in order."""
    for start in range(0, len(examples), size):
        yield examples[start : start + size]
