"""`--precision`: the compute dtype of training.

auto is the base's dtype, and fp32 uses fp32 for base and computation. bf16 and fp16 are mixed precision: the base is in
fp32 unless `--dtype` says otherwise, and PyTorch's autocast computes in 16 bits (Micikevicius et al. 2018, arXiv
1710.03740).
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
    """Raise a PeftcoreError unless the device exists and supports the precision, and the dtype fits it."""
    kind = device_choice.torch_device(device).type
    if precision not in PRECISIONS:
        raise PeftcoreError(f"--precision must be one of {', '.join(PRECISIONS)}, found '{precision}'")
    if precision == "fp32" and dtype == "bf16":
        raise PeftcoreError("--precision fp32 contradicts a base in bf16. Leave out --dtype bf16")
    if precision == "fp16" and kind != "cuda":
        raise PeftcoreError(
            "--precision fp16 scales gradients, which PyTorch does on CUDA only. On a CPU use --precision bf16"
        )


def base_dtype(precision: str, dtype: str) -> str:
    """Return the dtype of the base, as `--dtype` names it."""
    return "fp32" if precision != "auto" and dtype == "auto" else dtype


def arguments(precision: str) -> dict[str, bool]:
    """Return arguments for transformers' `TrainingArguments`."""
    return {name: precision == name for name in ("bf16", "fp16")}


def autocast(precision: str, device: str) -> AbstractContextManager[object]:
    """Return the autocast context of a training step, or a context that does nothing."""
    import torch

    if precision not in ("bf16", "fp16"):
        return contextlib.nullcontext()
    return torch.autocast(device, torch.bfloat16 if precision == "bf16" else torch.float16)


@contextlib.contextmanager
def own(model: nn.Module) -> Iterator[None]:
    """Make the model compute in its own dtype inside the block.

    accelerate puts a mixed-precision `forward` on the instance, which would make metrics differ from those before
    training and those of `peftcore eval`.
    """
    mixed_forward = model.__dict__.pop("forward", None) if "_original_forward" in model.__dict__ else None
    try:
        yield
    finally:
        if mixed_forward is not None:
            model.__dict__["forward"] = mixed_forward
