"""`--precision`: the compute dtype of training.

auto computes in the base's dtype, and fp32 uses fp32 for the base and the computation. bf16 and fp16 are mixed
precision: PyTorch's autocast computes in 16 bits over a base in fp32, or in the dtype of `--dtype` (Micikevicius et al.
2018, arXiv 1710.03740).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from peftcore.errors import PeftcoreError
from peftcore_cli.bases import device_choice

if TYPE_CHECKING:
    from torch import nn

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def check(precision: str, dtype: str, device: str) -> None:
    """Raise a PeftcoreError if the device is missing, or the device or --dtype contradicts the precision."""
    kind = device_choice.torch_device(device).type
    if precision not in PRECISIONS:
        raise PeftcoreError(f"--precision must be one of {', '.join(PRECISIONS)}, found '{precision}'")
    if precision == "fp32" and dtype == "bf16":
        raise PeftcoreError("--precision fp32 contradicts --dtype bf16. Remove --dtype bf16")
    if precision == "fp16" and kind != "cuda":
        raise PeftcoreError(
            "--precision fp16 needs loss scaling, which PyTorch only supports on CUDA. Use --precision bf16 on a CPU"
        )


def base_dtype(precision: str, dtype: str) -> str:
    """Return the dtype of the base, as `--dtype` names it."""
    return "fp32" if precision != "auto" and dtype == "auto" else dtype


def arguments(precision: str) -> dict[str, bool]:
    """Return arguments for transformers' `TrainingArguments`."""
    return {name: precision == name for name in ("bf16", "fp16")}


def autocast(precision: str, device: str) -> AbstractContextManager[object]:
    """Return the autocast context of a training step, or a null context."""
    import torch

    if precision not in ("bf16", "fp16"):
        return contextlib.nullcontext()
    return torch.autocast(device, torch.bfloat16 if precision == "bf16" else torch.float16)


@contextlib.contextmanager
def in_model_dtype(model: nn.Module) -> Iterator[None]:
    """Inside the block, compute in the model's own dtype.

    accelerate patches the instance with a mixed-precision `forward`, with which metrics would differ from `peftcore
    eval` and from the metrics before training.
    """
    mixed_forward = model.__dict__.pop("forward", None) if "_original_forward" in model.__dict__ else None
    try:
        yield
    finally:
        if mixed_forward is not None:
            model.__dict__["forward"] = mixed_forward
