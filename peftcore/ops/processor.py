"""Which instructions PyTorch's matrix products use on this processor, subject to ONEDNN_MAX_CPU_ISA."""

from __future__ import annotations

import platform

import torch


def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Return whether PyTorch computes products in this 16-bit dtype with oneDNN rather than with loops of its own."""
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    try:
        return bool(getattr(torch.ops.mkldnn, name)())
    except (AttributeError, NotImplementedError, RuntimeError):  # PyTorch was built without oneDNN
        return False


def has_instructions(dtype: torch.dtype) -> bool:
    """Return whether the processor multiplies this dtype with dedicated instructions and at least as fast as fp32."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if not onednn_multiplies(dtype):
        return False
    if dtype is torch.float16 or platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    # Without AVX-512 BF16 instructions, oneDNN emulates bf16 with AVX-512.
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
