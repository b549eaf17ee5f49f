"""Places weights in huge pages.

A product with few rows reads each weight once and takes a fifth longer with small pages.

A huge page has 2 MiB, and few weights are a multiple of that, so several packed weights are copied into one mapping.
Each tensor has its own storage, and a mapping lives as long as one of its tensors. A large dense weight is not copied.
Instead, Linux is asked to move its pages. The extension's `quantize_4bit` and `quantize_mxfp4` request huge pages for
their results themselves (csrc/common/huge_pages.h).
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
_GROUP_BYTES = 32 << 20  # size of a mapping, which is released only when the last of its tensors is freed
_ALIGNMENT = 64
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_mappings: WeakValueDictionary[int, mmap.mmap] = (
    WeakValueDictionary()
)  # mappings by the address of each of their tensors


def in_huge_pages(t: Tensor) -> Tensor:
    """Return a copy of a tensor in huge pages, or the tensor itself if it is too small for one or not on the CPU."""
    return _copies([t])[0] if _may_move(t) and t.nbytes >= _HUGE_PAGE else t


def move_to_huge_pages(tensors: Iterable[Tensor]) -> None:
    """Replace the memory (`.data`) of tensors by copies in huge pages, up to 32 MiB of tensors in one mapping.

    A tensor stays where it is if it is on another device, a view of a larger storage, shared with other processes, or
    already in huge pages. Tensors that would not fill one page together are not moved.
    """
    group: list[Tensor] = []
    size = 0
    for t in tensors:
        if _may_move(t.data) and t.data_ptr() not in _mappings:
            if group and size + t.nbytes > _GROUP_BYTES:
                _move(group)
                group, size = [], 0
            group.append(t)
            size += t.nbytes
    if size >= _HUGE_PAGE:
        _move(group)


def collapse(t: Tensor) -> None:
    """Ask Linux to move the memory of a large tensor into huge pages, in place."""
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
        and _huge_pages_enabled()
    )


def _move(tensors: list[Tensor]) -> None:
    for t, copy in zip(tensors, _copies([t.data for t in tensors]), strict=True):
        t.data = copy


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    """Return copies of the tensors in one mapping."""
    offsets, size = [], 0
    for t in tensors:
        offsets.append(size)
        size += -(-t.nbytes // _ALIGNMENT) * _ALIGNMENT
    # A mapping of whole huge pages is aligned to them by Linux.
    mapping = mmap.mmap(-1, -(-size // _HUGE_PAGE) * _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    huge_bytes = (
        (size + _HUGE_PAGE // 2) // _HUGE_PAGE * _HUGE_PAGE
    )  # a last page that would be less than half full uses small pages
    with suppress(OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE, 0, huge_bytes)
    copies = []
    for t, offset in zip(tensors, offsets, strict=True):
        copy = torch.frombuffer(mapping, dtype=t.dtype, count=t.numel(), offset=offset).view(t.shape).copy_(t)
        _mappings[copy.data_ptr()] = mapping
        copies.append(copy)
    return copies


@cache
def _huge_pages_enabled() -> bool:
    """Return whether Linux gives huge pages to processes that ask for them."""
    try:
        return sys.platform == "linux" and hasattr(mmap, "MADV_HUGEPAGE") and "[never]" not in _SETTING.read_text()
    except OSError:
        return False
