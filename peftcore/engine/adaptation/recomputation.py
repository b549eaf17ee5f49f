"""Recompute outputs in the backward pass instead of saving them.

    norm(x) -> q, k, v            act(gate) * up -> down            act(x) -> dense

A fused module saves its input for its own gradient. The layers that read its output do not save that output: the
backward pass recomputes it from the input, once for all layers. The output carries its `Source`, which adapted layers
and fused MLPs look for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

SOURCE = "_peftcore_source"  # attribute of an output; the value is its `Source`


class _Again:
    """Placeholder of a tensor that autograd would have saved."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape


class Source:
    """Source of an output: the function and the inputs that computed it.

    Args:
        compute: function that computes the output, without random numbers.
        inputs: inputs of the function, which the operator saves anyway.
        settings: small further inputs. They are copied, since FSDP may free a sharded weight.
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
        self._output: Tensor | None = None  # the recomputed output, until all layers have read it
        self._packed = self._unpacked = 0

    def __reduce__(self) -> tuple[Any, ...]:
        # Files and copies of the output get an empty set instead, a type that `weights_only` accepts.
        return set, ()

    def instead(self) -> AbstractContextManager[Any]:
        """Within the block, operators save the inputs instead of the output for their gradients.

        Inside other saved-tensor hooks, such as gradient checkpointing's, nothing changes.
        """
        if not _keeps_tensors():
            return contextlib.nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Any:
        is_it = tensor.untyped_storage()._cdata == self._storage and tensor._version == self._version
        if is_it and tensor.numel() == self._size and tensor.dtype is self._dtype and tensor.is_contiguous():
            self._packed += 1
            return _Again(tensor.shape)
        return tensor

    def _unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, _Again):
            return packed
        output = self._output
        if output is None:
            if [x._version for x in self._inputs] != self._versions:
                raise RuntimeError(
                    "the input of a fused module was changed in place after the forward pass, but backward() "
                    "recomputes the module's output from it. Change a copy of the input, or call "
                    "peftcore.fuse(model, recompute='none')"
                )
            with torch.no_grad():
                output = self._compute(*self._inputs, *self._settings)
        self._unpacked += 1
        is_last = self._unpacked >= self._packed
        self._output = None if is_last else output
        if is_last:  # with retain_graph=True, all layers may need it again
            self._unpacked = 0
        return output.view(packed.shape)


def with_source(
    output: Tensor, compute: Callable[..., Tensor], inputs: tuple[Tensor, ...], settings: tuple[Tensor | None, ...] = ()
) -> Tensor:
    """Return `output` with its `Source` attached if a layer may save it for a gradient."""
    if output.requires_grad and output.is_contiguous() and _keeps_tensors():
        setattr(output, SOURCE, Source(compute, inputs, settings, output))
    return output


def inputs_instead(x: Any) -> AbstractContextManager[Any]:
    """Within the block, save the source of x instead of x, if x has one."""
    source = getattr(x, SOURCE, None)
    return source.instead() if isinstance(source, Source) else contextlib.nullcontext()


def _keeps_tensors() -> bool:
    """Return whether autograd saves tensors without saved-tensor hooks."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is None
