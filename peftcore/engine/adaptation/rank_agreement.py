"""Checks that the ranks of tensor parallelism were given the same batch and draw the same random numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed
from torch.utils._pytree import tree_leaves

from peftcore.errors import PeftcoreError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def check_batch(inputs: Any, mesh: DeviceMesh) -> bool:
    """Return whether `inputs` hold values; raise a PeftcoreError unless the ranks have equal ones. Collective."""
    tensors = [each for each in tree_leaves(inputs) if isinstance(each, Tensor) and each.numel()]
    if not tensors:
        return False
    shapes = _number(repr([list(each.shape) for each in tensors]).encode())
    content = sum(number * _projection(each) for number, each in enumerate(tensors, 1))
    if max(_spread([shapes, content], mesh)) > 1e-6:
        raise PeftcoreError(
            "the ranks of tensor parallelism were given different batches, but each computes a part of every layer "
            "for one batch. Give all ranks the same batch, without a DistributedSampler over them"
        )
    return True


def check_random(device: torch.device, mesh: DeviceMesh) -> None:
    """Raise a PeftcoreError unless the ranks would draw the same random numbers. Collective."""
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    if _spread([_number(state.numpy().tobytes())], mesh)[0]:
        raise PeftcoreError(
            "the ranks of tensor parallelism have different random states, so each would train its copy of the adapter "
            "with another dropout. Seed all ranks equally before training: torch.manual_seed(seed)"
        )


def _projection(tensor: Tensor) -> float:
    values = tensor.detach().flatten().to(torch.float64)
    angles = torch.arange(len(values), device=values.device, dtype=torch.float64)
    return (values @ angles.cos() / values.norm().clamp(min=1e-30)).item()


def _number(content: bytes) -> int:
    """Return a number for `content` that float64 represents exactly."""
    return int.from_bytes(hashlib.sha256(content).digest()[:6], "big")


def _spread(facts: Sequence[float], mesh: DeviceMesh) -> list[float]:
    """Return the largest difference of each fact between the ranks of `mesh`. Collective."""
    both = [*facts, *(-fact for fact in facts)]
    extremes = torch.tensor(both, dtype=torch.float64, device=mesh.device_type)
    group = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")
    distributed.all_reduce(extremes, distributed.ReduceOp.MAX, group=group)
    found: list[float] = (extremes[: len(facts)] + extremes[len(facts) :]).tolist()
    return found
