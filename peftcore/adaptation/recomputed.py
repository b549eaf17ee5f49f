"""Activations that are cheap to compute again, and are not kept for the gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


class _Again:
    """Stands for a tensor that autograd would have kept."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape


def recomputed(
    compute: Callable[..., Tensor], inputs: tuple[Tensor, ...], output: Tensor
) -> AbstractContextManager[Any]:
    """Keep `inputs` instead of `output` for the gradient of operators that are called in the block.

    The inputs are expected to be kept anyway, by the operator that made `output`. In a block of other hooks for kept
    tensors, such as those of gradient checkpointing, nothing changes.

    Args:
        compute: function that makes the output from the inputs, without random numbers.
        inputs: its inputs.
        output: its result, contiguous.
    """
    if not output.requires_grad or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return contextlib.nullcontext()
    storage, size, dtype, version = output.untyped_storage()._cdata, output.numel(), output.dtype, output._version
    versions = [x._version for x in inputs]

    def pack(kept: Tensor) -> Any:
        is_it = kept.untyped_storage()._cdata == storage and kept._version == version
        if is_it and kept.numel() == size and kept.dtype is dtype and kept.is_contiguous():
            return _Again(kept.shape)
        return kept

    def unpack(kept: Any) -> Tensor:
        if not isinstance(kept, _Again):
            return kept
        if [x._version for x in inputs] != versions:
            raise RuntimeError(
                "inputs of a gated activation were changed in place after the forward pass, which backward() computes "
                "again. Change copies of them, or call peftcore.fuse(model, enabled=False)"
            )
        with torch.no_grad():
            return compute(*inputs).view(kept.shape)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
