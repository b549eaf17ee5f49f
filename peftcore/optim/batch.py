"""The tensors that a step updates on one device, as arguments of an operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftcore.ops.optim import Updates

_PLAIN = (Tensor, nn.Parameter)


def local(t: Any) -> Any:
    """Return a DTensor's local shard; return any other tensor unchanged."""
    return t if type(t) in _PLAIN or not hasattr(t, "to_local") else t.to_local()


def sharded_as(param: Any, shard: Tensor) -> Tensor:
    """Return a tensor with the local shard `shard`, placed like the DTensor `param`."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        shard, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


class Batch:
    """Parameters of one device, their gradients, and rows of scalars that they share."""

    def __init__(self) -> None:
        self.owners: list[Tensor] = []  # the optimizer's parameters
        self.states: list[dict[str, Any]] = []  # their state
        self.params: list[Tensor] = []  # the tensors to update: shards, or contiguous copies
        self.grads: list[Tensor] = []
        self.rows: list[int] = []
        self.streams: list[int] = []
        self.steps: list[int] = []  # for each row
        self.scalars: list[float] = []
        self.row_numbers: dict[tuple[int, int], int] = {}  # index of the row of scalars, by group and step
        self.copies: list[tuple[Tensor, Tensor]] = []  # (parameter, its contiguous copy)

    def add_row(self, group: int, step: int, scalars: tuple[float, ...]) -> int:
        """Add a row of scalars for the parameters of a group with the same number of updates, and return its index."""
        row = self.row_numbers[group, step] = len(self.steps)
        self.steps.append(step)
        self.scalars += scalars
        return row

    def add(self, owner: Tensor, state: dict[str, Any], grad: Tensor, row: int, stream: int) -> None:
        """Add a parameter with its state and its gradient."""
        param = owner
        if type(owner) not in _PLAIN:
            param, grad = local(owner), local(grad)
        if not param.is_contiguous():
            strided, param = param, param.contiguous()
            self.copies.append((strided, param))
        self.owners.append(owner)
        self.states.append(state)
        self.params.append(param)
        self.grads.append(grad if grad.is_contiguous() else grad.contiguous())
        self.rows.append(row)
        self.streams.append(stream)

    def updates(self) -> Updates:
        """Return the operator's arguments other than the tensors."""
        at_random = any(stream >= 0 for stream in self.streams)
        return Updates(self.scalars, self.steps, self.rows, self.streams if at_random else [])

    def copy_back(self) -> None:
        """Copy results back into non-contiguous parameters, and tell autograd about all changes."""
        for param, copy in self.copies:
            param.copy_(copy)
        torch.autograd.graph.increment_version(self.params)
