"""Weights in huge pages: a product of few rows reads each weight once, and small pages cost it a fifth of the time.

Codes are copied into mappings that several of them share, since a huge page has 2 MiB and few are a multiple of it.
Each tensor has a storage of its own, and a mapping lives as long as one of its tensors. A large dense weight stays
where it is: the system is asked to move its pages. The extension's `quantize_4bit` and `quantize_mxfp4` ask for their
results (csrc/common/huge_pages.h).
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from peftcore.ops._extension import extension

_HUGE_PAGE = 2 << 20  # bytes
_TOGETHER = 32 << 20  # bytes of tensors that share a mapping: its memory is free when all of them are
_ALIGNMENT = 64
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_held: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()  # mappings by the address of each of their tensors


def in_huge_pages(t: Tensor) -> Tensor:
    """Return a copy of a tensor in huge pages, or the tensor itself if it is too small for one or not on the CPU."""
    return _copies([t])[0] if _may_move(t) and t.nbytes >= _HUGE_PAGE else t


def move_to_huge_pages(tensors: Iterable[Tensor]) -> None:
    """Replace the memory (`.data`) of tensors by copies in huge pages, those of up to 32 MiB together.

    Tensors stay where they are if they are on other devices, views of a larger storage, shared with other processes, or
    in huge pages already, and all of them if they would not fill one.
    """
    together: list[Tensor] = []
    size = 0
    for t in tensors:
        if _may_move(t.data) and t.data_ptr() not in _held:
            if together and size + t.nbytes > _TOGETHER:
                _move(together)
                together, size = [], 0
            together.append(t)
            size += t.nbytes
    if size >= _HUGE_PAGE:
        _move(together)


def collapse(t: Tensor) -> None:
    """Ask the system to move the memory of a large tensor into huge pages, in place."""
    if extension is not None and _may_move(t.data):
        extension.move_into_huge_pages(t.data_ptr(), t.nbytes)


def _may_move(t: Tensor) -> bool:
    return (
        type(t) is Tensor
        and t.device.type == "cpu"
        and t.layout is torch.strided
        and t.is_contiguous()
        and t.untyped_storage().nbytes() == t.nbytes
        and not t.is_shared()
        and _are_granted()
    )


def _move(tensors: list[Tensor]) -> None:
    for t, copy in zip(tensors, _copies([t.data for t in tensors]), strict=True):
        t.data = copy


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    """Return copies in one mapping."""
    begins, size = [], 0
    for t in tensors:
        begins.append(size)
        size += -(-t.nbytes // _ALIGNMENT) * _ALIGNMENT
    # Linux aligns mappings of whole huge pages.
    mapping = mmap.mmap(-1, -(-size // _HUGE_PAGE) * _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = (size + _HUGE_PAGE // 2) // _HUGE_PAGE * _HUGE_PAGE  # the last page is a small part of it, or small pages
    with suppress(OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE, 0, whole)
    found = []
    for t, begin in zip(tensors, begins, strict=True):
        copy = torch.frombuffer(mapping, dtype=t.dtype, count=t.numel(), offset=begin).view(t.shape).copy_(t)
        _held[copy.data_ptr()] = mapping
        found.append(copy)
    return found


@cache
def _are_granted() -> bool:
    """Return whether the system gives huge pages to processes that ask for them."""
    try:
        return sys.platform == "linux" and hasattr(mmap, "MADV_HUGEPAGE") and "[never]" not in _SETTING.read_text()
    except OSError:
        return False
