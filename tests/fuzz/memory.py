"""Tensors whose memory ends or begins at a page that cannot be read: to go beyond them is a segmentation fault."""

import ctypes
import mmap

import torch

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_PROT_NONE = 0


def guarded(count, dtype, at_end=True):
    """`count` elements in pages of their own, behind the last or before the first of which nothing can be read."""
    if count == 0:
        return torch.empty(0, dtype=dtype)
    size = count * dtype.itemsize
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    closed, offset = (pages * PAGE, pages * PAGE - size) if at_end else (0, PAGE)
    if _libc.mprotect(ctypes.c_void_p(start + closed), ctypes.c_size_t(PAGE), _PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset)


def laid_out(values, layout, at_end=True):
    """The values of a dense tensor in guarded memory, laid out in one of LAYOUTS."""
    shape = values.shape
    if layout == "expanded" and values.dim() and shape[0]:
        row = laid_out(values[:1], "contiguous", at_end)
        return row.expand(shape)
    if layout == "overlapping" and values.dim() == 2 and min(shape) > 0:
        return (
            guarded(shape[0] + shape[1] - 1, values.dtype, at_end)
            .copy_(torch.cat([values[0], values[1:, -1]]))
            .as_strided(shape, (1, 1))
        )
    if layout == "transposed" and values.dim() >= 2:
        return laid_out(values.transpose(-1, -2), "contiguous", at_end).transpose(-1, -2)
    if layout == "strided" and values.dim() and values.numel():
        memory = guarded(2 * values.numel() - 1, values.dtype, at_end)
        strides = torch.empty(shape, device="meta").stride()
        return memory.as_strided(shape, [2 * stride for stride in strides]).copy_(values)
    if layout == "shifted" and values.numel():
        return guarded(values.numel() + 1, values.dtype, at_end)[1:].view(shape).copy_(values)
    return guarded(values.numel(), values.dtype, at_end).view(shape).copy_(values)


LAYOUTS = ("contiguous", "contiguous", "shifted", "transposed", "strided", "expanded", "overlapping")
