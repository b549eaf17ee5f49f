"""Context managers for evaluation mode and for numeric checks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode within the block, and restore the mode of each module afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def numeric_check() -> Iterator[None]:
    """Compute on the CPU with gradients, a fixed seed and no warnings, whatever modes the caller has set."""
    with (
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.device("cpu"),
        torch._C._DisableAutocast(),
    ):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        yield
