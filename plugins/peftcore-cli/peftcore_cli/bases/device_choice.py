"""Convert the values of --device and --dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftcore.errors import PeftcoreError

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "fp32", "bf16")
HALVES = {"bf16": "bfloat16", "fp16": "float16"}


def torch_device(device: str) -> torch.device:
    """Return the device; `auto` is CUDA if there is one.

    Raises:
        PeftcoreError: PyTorch does not know the device or cannot use it.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found_device = torch.device(device)
    except RuntimeError as error:
        raise PeftcoreError(f"unknown device '{device}'. Use auto, cpu, cuda, or cuda:1") from error
    if found_device.type == "cuda" and not torch.cuda.is_available():
        raise PeftcoreError(f"device '{device}' is not available: PyTorch {torch.__version__} finds no CUDA device")
    if (
        found_device.type == "cuda"
        and found_device.index is not None
        and found_device.index >= (count := torch.cuda.device_count())
    ):
        raise PeftcoreError(f"device '{device}' is not available. Use one of cuda:0 to cuda:{count - 1}")
    if found_device.type == "meta":
        raise PeftcoreError(
            "device 'meta' cannot compute, because its tensors have no values. Use auto, cpu, cuda, or cuda:1"
        )
    if found_device.type not in ("cpu", "cuda"):
        try:
            torch.empty(0, device=found_device)
        except (RuntimeError, AssertionError, ImportError) as error:
            reason = str(error).partition("\n")[0]
            raise PeftcoreError(f"device '{device}' is not available: {reason}. Use auto, cpu, or cuda") from error
    return found_device


def torch_dtype(dtype: str, device: str) -> torch.dtype:
    """Return the dtype; `auto` is bf16 on a CUDA device that supports it, else fp32. For CPUs see `dtype_choice`."""
    import torch

    if dtype not in DTYPES:
        raise PeftcoreError(f"--dtype must be one of {', '.join(DTYPES)}, found '{dtype}'")
    on_cuda = torch_device(device).type == "cuda"
    if dtype == "bf16" or (dtype == "auto" and on_cuda and torch.cuda.is_bf16_supported()):
        return torch.bfloat16
    return torch.float32


def without_instructions(dtype: str) -> str | None:
    """Return a message if this processor has no matrix instructions for a dtype (`fp32`, `bf16`, `fp16`)."""
    import torch

    from peftcore.ops.processor import has_instructions

    if dtype not in HALVES or has_instructions(getattr(torch, HALVES[dtype])):
        return None
    return f"this processor has no {dtype} instructions, so matrix products in {dtype} are slow"
