"""Modes in which a model, or a check of one of its modules, runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode within the block; afterwards each module has the mode that it had."""
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
    """Compute on the CPU with gradients and a fixed seed, whatever modes the caller is in; warnings are ignored."""
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
