"""Outputs that are cheap to compute again, and are not kept for the gradient.

    norm(x) -> q, k, v            act(gate) * up -> down            act(x) -> dense

A fused module keeps its input for its own gradient. What the layers that its output is given to would keep of the
output is computed again from this input in the backward pass, once for all of them. The output carries its `Source`;
adapted layers and fused MLPs look for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

SOURCE = "_peftcore_source"  # attribute of an output


class _Again:
    """Stands for a tensor that autograd would have kept."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape


class Source:
    """What an output is made from.

    Args:
        compute: function that makes the output, without random numbers.
        inputs: its inputs, which the operator that made the output keeps anyway.
        settings: its other inputs, a few numbers, of which copies are kept: ranks may free a sharded weight.
        output: the output, contiguous.
    """

    def __init__(
        self,
        compute: Callable[..., Tensor],
        inputs: tuple[Tensor, ...],
        settings: tuple[Tensor | None, ...],
        output: Tensor,
    ) -> None:
        self._compute = compute
        self._inputs = [x.detach() for x in inputs]
        self._settings = [None if t is None else t.detach().clone() for t in settings]
        self._versions = [x._version for x in inputs]
        self._storage, self._version = output.untyped_storage()._cdata, output._version
        self._size, self._dtype = output.numel(), output.dtype
        self._output: Tensor | None = None  # while some of those who need it have it not yet
        self._packed = self._unpacked = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return set, ()  # files and copies of the output do not have it: a type that `weights_only` reads

    def instead(self) -> AbstractContextManager[Any]:
        """Keep the inputs instead of the output for the gradient of operators that are called in the block.

        In a block of other hooks for kept tensors, such as those of gradient checkpointing, nothing changes.
        """
        if not _keeps_tensors():
            return contextlib.nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, kept: Tensor) -> Any:
        is_it = kept.untyped_storage()._cdata == self._storage and kept._version == self._version
        if is_it and kept.numel() == self._size and kept.dtype is self._dtype and kept.is_contiguous():
            self._packed += 1
            return _Again(kept.shape)
        return kept

    def _unpack(self, kept: Any) -> Tensor:
        if not isinstance(kept, _Again):
            return kept
        output = self._output
        if output is None:
            if [x._version for x in self._inputs] != self._versions:
                raise RuntimeError(
                    "the input of a fused module was changed in place after the forward pass, and backward() computes "
                    "the module's output again from it. Change a copy of it, or call "
                    "peftcore.fuse(model, recompute='none')"
                )
            with torch.no_grad():
                output = self._compute(*self._inputs, *self._settings)
        self._unpacked += 1
        last = self._unpacked >= self._packed
        self._output = None if last else output
        if last:  # with retain_graph=True they may all need it again
            self._unpacked = 0
        return output.view(kept.shape)


def with_source(
    output: Tensor, compute: Callable[..., Tensor], inputs: tuple[Tensor, ...], settings: tuple[Tensor | None, ...] = ()
) -> Tensor:
    """Return `output` with its `Source`, if a layer may keep the output for a gradient."""
    if output.requires_grad and output.is_contiguous() and _keeps_tensors():
        setattr(output, SOURCE, Source(compute, inputs, settings, output))
    return output


def inputs_instead(x: Any) -> AbstractContextManager[Any]:
    """Keep what x is made from instead of x in the block, if that is known."""
    source = getattr(x, SOURCE, None)
    return source.instead() if isinstance(source, Source) else contextlib.nullcontext()


def _keeps_tensors() -> bool:
    """Return whether autograd keeps tensors as they are, without hooks."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is None
