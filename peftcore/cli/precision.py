"""`--precision`: in what the products of training are computed.

auto is the base's own dtype; fp32 is fp32 for both; bf16 and fp16 are mixed precision: a base in fp32 unless `--dtype`
says another, whose products PyTorch's autocast rounds to 16 bits (Micikevicius et al. 2018, arXiv 1710.03740).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from peftcore.cli import models
from peftcore.errors import PeftcoreError

if TYPE_CHECKING:
    from torch import nn

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def check(precision: str, dtype: str, device: str) -> None:
    """Raise a PeftcoreError unless this machine can train so, and the base's dtype goes with it."""
    if precision not in PRECISIONS:
        raise PeftcoreError(f"--precision is one of {', '.join(PRECISIONS)}, found '{precision}'")
    if precision == "fp32" and dtype == "bf16":
        raise PeftcoreError("--precision fp32 is not what a base in bf16 computes in. Leave out --dtype bf16")
    if precision == "fp16" and models.torch_device(device).type != "cuda":
        raise PeftcoreError(
            "--precision fp16 scales its gradients, which PyTorch does on CUDA only. On a CPU: --precision bf16"
        )


def base_dtype(precision: str, dtype: str) -> str:
    """The dtype of the base, as `--dtype` names it."""
    return "fp32" if precision != "auto" and dtype == "auto" else dtype


def arguments(precision: str) -> dict[str, bool]:
    """Of transformers' `TrainingArguments`."""
    return {name: precision == name for name in ("bf16", "fp16")}


@contextlib.contextmanager
def own(model: nn.Module) -> Iterator[None]:
    """Within the block the model computes in its own dtype.

    Mixed precision is a `forward` of the instance's own, which accelerate puts in place; what is measured would be
    another figure than before training, and than that of `peftcore eval`.
    """
    mixed = model.__dict__.pop("forward", None) if "_original_forward" in model.__dict__ else None
    try:
        yield
    finally:
        if mixed is not None:
            model.__dict__["forward"] = mixed
