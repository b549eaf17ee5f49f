"""Operators' kernels in Triton, for CUDA tensors where triton can be imported."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

AVAILABLE = find_spec("triton") is not None
# Device types on which functions call operators with Triton kernels. On others they use plain formulas, since the
# operator's reference would make fp32 copies. Meta tensors count as CPU tensors.
DEVICES: tuple[str, ...] = ("cpu", "meta", *(("cuda",) if AVAILABLE else ()))
KERNELS: dict[str, Callable[..., Any]] = {}  # by name of the operator


def add_kernel(name: str, module: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Add the operator `name` for CUDA tensors: the function of this name in a module of `peftcore.ops.triton`.

    The module is imported by the first call, because importing triton takes half a second. Empty tensors, float64 and
    GPUs before Ampere use the reference.

    Args:
        name: name of the operator.
        module: name of the module in `peftcore.ops.triton`.
        call: constructor of the operator's `Call`, which checks the arguments.

    Returns:
        The operator's implementation.
    """

    def kernel(*args: Any, **kwargs: Any) -> Any:
        checked = call(*args, **kwargs)
        first: Tensor = args[0]
        if first.numel() == 0 or first.dtype is torch.float64 or not is_supported(first.device):
            with torch.no_grad():
                return checked.compute()
        launch = getattr(importlib.import_module(f"peftcore.ops.triton.{module}"), name)
        with torch.cuda.device_of(first):
            return launch(checked)

    KERNELS[name] = kernel
    return kernel


@cache
def is_supported(device: torch.device) -> bool:
    """Return whether Triton compiles bf16 for the GPU: from compute capability 8.0 on, and for AMD's GPUs."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
