"""Memory for codes in huge pages: a product of few rows reads a large weight once, and small pages cost it a third.

The extension's `quantize_4bit` and `quantize_mxfp4` ask for theirs themselves (csrc/common/huge_pages.h).
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20  # bytes


def empty_bytes(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return uninitialized uint8 of this shape, in huge pages where it is large and the system grants them."""
    memory = torch.empty(shape, dtype=torch.uint8, device=device)
    if device.type == "cpu" and type(memory) is Tensor and memory.nbytes >= 2 * _HUGE_PAGE:
        begin, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes
        begin += -begin % mmap.PAGESIZE
        advise = _madvise()
        if advise is not None:
            advise(
                begin, end // mmap.PAGESIZE * mmap.PAGESIZE - begin, mmap.MADV_HUGEPAGE
            )  # if refused, pages stay small
    return memory


def in_huge_pages(codes: Tensor) -> Tensor:
    """Return a copy of uint8 codes made by `empty_bytes`, or the codes themselves if they are too small for one."""
    if codes.nbytes < 2 * _HUGE_PAGE or codes.device.type != "cpu":
        return codes
    return empty_bytes(tuple(codes.shape), codes.device).copy_(codes)


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """Return the C library's `madvise`, or None where the system has no huge pages to ask for."""
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    found: Callable[[int, int, int], int] = function
    return found
