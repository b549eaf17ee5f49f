"""Operators with a kernel for CPUs only, followed as that kernel on meta tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from peftcore import ops


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(x, g)
        return torch.ops.peftcore.scaled(x, g)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, g = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dx, dg = torch.ops.peftcore.scaled_backward(dy, x, g, needs)
        return dx if needs[0] else None, dg if needs[1] else None


@contextmanager
def kernels_of_cpu() -> Iterator[None]:
    """Make `ops.scaled` on meta tensors one operator, as on a CPU, within the block.

    On other devices, meta included, it consists of PyTorch's operators, which create a matrix in fp32 for 16 bits.
    Without the extension nothing changes, since the reference creates this matrix, too.
    """
    original = ops.scaled

    def scaled(x: Tensor, g: Tensor, behind: int = 0) -> Tensor:
        if not x.is_meta or behind or x.dtype is torch.float64:
            return original(x, g, behind)
        return _Scaled.apply(x, g)  # type: ignore[no-untyped-call]

    if ops.extension is not None:
        ops.scaled = scaled
    try:
        yield
    finally:
        ops.scaled = original
