"""Ranks of a distributed run: communication, writing on one rank, and checks that all ranks agree.

Without `torch.distributed` there is one rank, and all tensors are full tensors. Functions marked collective must be
called by every rank. `sharded.py` reads and writes sharded parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.nn import functional

from peftcore.errors import PeftcoreError
from peftcore.plugin.sharded import (  # some are re-exported for plugins
    fill as fill,
    has_divided as has_divided,
    has_process_group,
    is_dtensor as is_dtensor,
    is_shard,
    local as local,
    shape_of as shape_of,
    whole as whole,
)

T = TypeVar("T")


def rank() -> int:
    """Return this process's rank, counted from 0."""
    return distributed.get_rank() if has_process_group() else 0


def count() -> int:
    """Return the number of ranks."""
    return distributed.get_world_size() if has_process_group() else 1


def refuse_context_parallel(subject: str) -> None:
    """Raise a PeftcoreError inside PyTorch's `context_parallel`, where each rank has different tokens of a sequence.

    Args:
        subject: the part that needs full sequences, such as `a soft prompt`.
    """
    attention = sys.modules.get("torch.distributed.tensor.experimental._context_parallel._attention")
    if attention is not None and functional.scaled_dot_product_attention in attention._replaced_functions:
        raise PeftcoreError(
            f"{subject} needs full sequences, but context_parallel splits them over the ranks. Use a method that "
            "treats all tokens alike, or call the model outside context_parallel"
        )


def once(action: Callable[[], object], *, together: bool) -> None:
    """Run `action` on rank 0 alone.

    Args:
        together: all ranks wait for rank 0 and raise its exception (collective). If False, the other ranks continue at
            once.
    """
    failure: list[Exception | None] = [None]
    if rank() == 0:
        try:
            action()
        except Exception as error:
            if not together or count() == 1:
                raise
            failure = [error]
    if together and count() > 1:
        distributed.broadcast_object_list(failure, src=0)
        if failure[0] is not None:
            raise failure[0]


@contextmanager
def explaining_failure(failure: str) -> Iterator[None]:
    """Explain a communication error in the block: what failed, and what to do.

    Args:
        failure: what failed, as a sentence without its full stop.

    Raises:
        PeftcoreError: communication has failed.
    """
    try:
        yield
    except RuntimeError as error:  # error types of gloo and NCCL
        if count() == 1 or isinstance(error, torch.OutOfMemoryError):
            raise
        raise PeftcoreError(
            f"{failure}: {error}. If another rank has exited, check its output, and restart the run from its last "
            "checkpoint"
        ) from error


def of_first(value: T) -> T:
    """Broadcast rank 0's value, which must be picklable, and return it. Collective."""
    if count() == 1:
        return value
    message = [value]
    distributed.broadcast_object_list(message, src=0)
    return message[0]


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Copy rank 0's values of unsharded tensors to every rank, unless some are on the meta device. Collective."""
    tensors = [tensor for tensor in dict.fromkeys(tensors) if not is_shard(tensor)]
    if any_of(any(tensor.is_meta for tensor in tensors)):  # accelerate fills them itself, from rank 0
        return
    for tensor in tensors:
        message = tensor.detach().to(message_device()).contiguous()
        distributed.broadcast(message, src=0)
        tensor.copy_(message)


def check_equal(facts: dict[str, Any], subject: str) -> None:
    """Raise a PeftcoreError on every rank unless all ranks have the same `facts`. Collective.

    Args:
        subject: what the facts describe, for the error message, such as `adapters`.
    """
    if count() == 1:
        return
    facts_of_ranks: list[Any] = [None] * count()
    distributed.all_gather_object(facts_of_ranks, facts)
    expected = facts_of_ranks[0]
    for number, facts_of_rank in enumerate(facts_of_ranks):
        for name in dict.fromkeys([*expected, *facts_of_rank]):
            value, other_value = expected.get(name, "nothing"), facts_of_rank.get(name, "nothing")
            if value != other_value:
                raise PeftcoreError(
                    f"ranks have different {subject}: '{name}' is {value} on rank 0, but {other_value} on rank "
                    f"{number}. On every rank, load the same model and call apply with the same arguments"
                )


def find_unequal(tensors: Mapping[str, Tensor]) -> tuple[str, int, float] | None:
    """Find a tensor that should have the same values on all ranks but differs. Collective.

    Sharded tensors are skipped. Rounding may differ by 1 % of the largest value.

    Returns:
        (name, rank, largest difference from rank 0), or None.
    """
    if count() == 1:
        return None
    plain = {name: tensor.detach() for name, tensor in tensors.items() if not is_shard(tensor)}
    check_equal({name: f"{list(tensor.shape)} of {tensor.dtype}" for name, tensor in plain.items()}, "adapters")
    unequal: tuple[str, float] | None = None
    for name, tensor in plain.items():
        if not tensor.numel():
            continue
        values = tensor.to(message_device(), torch.float32, copy=True).nan_to_num_()
        expected = values.clone(memory_format=torch.contiguous_format)
        distributed.broadcast(expected, src=0)
        largest = (values - expected).abs().max().item()
        # Each rank continues to the last tensor, because a broadcast needs all ranks.
        if unequal is None and largest > 0.01 * expected.abs().max().item():
            unequal = name, largest
    unequal_on_ranks: list[tuple[str, float] | None] = [None] * count()
    distributed.all_gather_object(unequal_on_ranks, unequal)
    for number, entry in enumerate(unequal_on_ranks):
        if entry is not None:
            return entry[0], number, entry[1]
    return None


def any_of(flag: bool) -> bool:
    """Return whether `flag` is true on any rank. Collective."""
    if count() == 1:
        return flag
    message = torch.tensor(int(flag), device=message_device())
    distributed.all_reduce(message, distributed.ReduceOp.MAX)
    return bool(message)


def message_device() -> str:
    """Return the device for communication between ranks."""
    return "cuda" if distributed.get_backend() == "nccl" else "cpu"
