"""Ranks of a distributed run: whole tensors out of sharded ones, a single writer, and agreement between ranks.

Two kinds of parameters are sharded: DTensors (FSDP2, tensor parallelism), and those that DeepSpeed's ZeRO-3 has
partitioned, which have no elements between calls: their shape is `ds_shape`, and DeepSpeed gathers them.

Without `torch.distributed` there is one rank, and every tensor is whole. Functions marked collective must be called by
every rank.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from peftcore.errors import PeftcoreError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

T = TypeVar("T")


def rank() -> int:
    """Return this process's rank, from 0."""
    return distributed.get_rank() if _running() else 0


def count() -> int:
    """Return the number of ranks."""
    return distributed.get_world_size() if _running() else 1


def is_sharded(module: nn.Module) -> bool:
    """Return whether every rank holds only a part of some parameters of `module`."""
    if not _running():  # a model is sharded by a process group, which may have ended since; then all of it is
        return any(map(is_part, islice(module.parameters(), 1)))
    return any(map(is_part, module.parameters()))


def is_part(tensor: Tensor) -> bool:
    """Return whether this rank holds a part of `tensor` only: it is a DTensor, or ZeRO-3 has partitioned it."""
    return is_dtensor(tensor) or is_partitioned(tensor)


def any_part(tensors: Iterable[Tensor]) -> bool:
    """Return whether `is_part` holds for one of `tensors`, in one call for all of them."""
    return bool([tensor for tensor in tensors if hasattr(tensor, "full_tensor") or hasattr(tensor, "ds_id")])


def is_dtensor(tensor: Tensor) -> TypeIs[DTensor]:
    """Return whether `tensor` is a DTensor."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, with its memory; any other tensor itself."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def is_partitioned(tensor: Tensor) -> bool:
    """Return whether `tensor` is a parameter that DeepSpeed's ZeRO-3 has partitioned, gathered now or not."""
    return hasattr(tensor, "ds_id")


def shape_of(tensor: Tensor) -> torch.Size:
    """Shape of the whole tensor, also where ZeRO-3 has left no elements of it here."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def whole(tensor: Tensor) -> Tensor:
    """Return the detached tensor itself, or the whole of which a sharded one is a part. Collective for the latter."""
    if is_partitioned(tensor):
        with gathered([tensor]):
            return tensor.detach().clone()
    tensor = tensor.detach()
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


@contextmanager
def gathered(tensors: Iterable[Tensor], *, write: bool = False) -> Iterator[None]:
    """Give the ZeRO-3 parameters among `tensors` all their elements within the block. Collective where there are any.

    Args:
        write: keep what the block writes into them on rank 0, also in the optimizer's float32 copy.
    """
    partitioned = [each for each in dict.fromkeys(tensors) if is_partitioned(each)]
    if not write:  # small ones may be whole already, which is enough for reading
        partitioned = [each for each in partitioned if each.shape != shape_of(each)]
    if not partitioned:
        yield
        return
    import deepspeed  # type: ignore[import-not-found, import-untyped, unused-ignore]  # optional

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if write else None):
        yield
    for parameter in partitioned if write else ():
        if getattr(parameter, "_z3_optimizer", None) is not None:  # else nothing trains it
            deepspeed.utils.safe_set_local_fp32_param(parameter, cast(Any, parameter).ds_tensor)


class Unread(Tensor):
    """Stand-in for a parameter of which this rank has a part, with the shape of the whole, which is read when used."""

    _is_param = True  # so that it is an instance of nn.Parameter
    part: Tensor

    @staticmethod
    def __new__(cls, part: Tensor) -> Unread:
        found = Tensor._make_wrapper_subclass(
            cls, shape_of(part), dtype=part.dtype, device=part.device, requires_grad=part.requires_grad
        )
        found.part = part
        return found

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        return f"Unread({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        written = [arg for arg, value in zip(args, operator._schema.arguments, strict=False) if value.is_write]
        if any(isinstance(each, Unread) for each in written):
            raise PeftcoreError("the base's weights are sharded, and cannot be changed while an adapter is applied")
        return operator(*tree_map_only(Unread, _read, args), **tree_map_only(Unread, _read, kwargs or {}))


def _read(stand_in: Unread) -> Tensor:
    return whole(stand_in.part)


def behind(tensor: Tensor) -> Tensor:
    """Return the parameter behind a stand-in, or the tensor itself."""
    return tensor.part if isinstance(tensor, Unread) else tensor


@contextmanager
def whole_when_read(model: nn.Module) -> Iterator[None]:
    """Make reads of sharded parameters inside the block return the whole parameter. Collective.

    Parameters are gathered one at a time, and only if their values are read. No forward pass may run inside the block
    where some stay sharded in forward passes.
    """
    if not is_sharded(model):
        yield
        return
    slots = [
        (module._parameters, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and is_part(parameter)
    ]
    stand_ins = {id(parameter): cast(nn.Parameter, Unread(parameter)) for _, _, parameter in slots}
    for parameters, name, parameter in slots:
        parameters[name] = stand_ins[id(parameter)]  # tied parameters stay tied
    try:
        yield
    finally:
        for parameters, name, parameter in slots:
            if isinstance(parameters[name], Unread):  # otherwise a forward of FSDP2 has restored its own
                parameters[name] = parameter


def enclosed(module: nn.Module, fsdp: bool = False) -> Iterator[tuple[bool, nn.Module]]:
    """Yield (whether FSDP2 gathers its parameters for a forward pass, the module) for all modules inside."""
    fsdp = fsdp or hasattr(module, "unshard")
    yield fsdp, module
    for child in module.children():
        yield from enclosed(child, fsdp)


def has_divided(module: nn.Module) -> bool:
    """Return whether a parameter of `module` is divided in a forward pass, too, unless FSDP2 does that outside."""
    found = [(fsdp, parameter) for fsdp, part in enclosed(module) for parameter in part._parameters.values()]
    return any(parameter is not None and is_divided(behind(parameter), fsdp=fsdp) for fsdp, parameter in found)


def is_divided(tensor: Tensor, *, fsdp: bool) -> bool:
    """Return whether a rank has only a part of `tensor` in a forward pass, too, as in tensor parallelism.

    Args:
        fsdp: whether FSDP2 gathers it, in one dimension of its mesh.
    """
    return is_dtensor(tensor) and sum(not placement.is_replicate() for placement in tensor.placements) > fsdp


@contextmanager
def whole_parameters(module: nn.Module) -> Iterator[nn.Module]:
    """Make the sharded parameters of `module` whole inside the block. Collective if there are any."""
    parts = [
        (m, name, p) for m in module.modules() for name, p in m._parameters.items() if p is not None and is_part(p)
    ]
    for owner, name, parameter in parts:
        owner._parameters[name] = nn.Parameter(whole(parameter), parameter.requires_grad)
    try:
        yield module
    finally:
        for owner, name, parameter in parts:
            owner._parameters[name] = parameter


def fill(parameter: Tensor, value: Tensor) -> None:
    """Copy `value` into `parameter`; into a DTensor, this rank's part of it. A ZeRO-3 parameter must be `gathered`."""
    if is_dtensor(parameter):
        parameter.to_local().copy_(divided_as(value, parameter).to_local())
    else:
        parameter.copy_(value)


def divided_as(value: Tensor, like: DTensor) -> DTensor:
    """Return `value`, which every rank has, divided as `like` is; nothing is communicated."""
    from torch.distributed.tensor import distribute_tensor

    value = value.detach().to(like.device_mesh.device_type, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def refuse_sharded(module: nn.Module, what: str) -> None:
    """Raise a PeftcoreError if `module` is sharded. `what`: what cannot be done then, such as `merge`."""
    if is_sharded(module):
        raise PeftcoreError(
            f"cannot {what}: the model is sharded, and no rank has a whole weight. "
            "Save the adapter, and do it in a single process"
        )


def refuse_context_parallel(what: str) -> None:
    """Raise a PeftcoreError inside PyTorch's `context_parallel`, where every rank has other tokens of a sequence.

    Args:
        what: what needs whole sequences, such as `a soft prompt`.
    """
    attention = sys.modules.get("torch.distributed.tensor.experimental._context_parallel._attention")
    if attention is not None and functional.scaled_dot_product_attention in attention._replaced_functions:
        raise PeftcoreError(
            f"{what} needs whole sequences, and context_parallel gives each rank a part of them. Use a method that "
            "treats all tokens alike, or call the model outside context_parallel"
        )


def reshard(module: nn.Module) -> None:
    """Make `fully_shard` free whole parameters that a forward left in their slots."""
    if count() == 1:
        return
    for part in module.modules():
        if hasattr(part, "unshard") and (reshard := getattr(part, "reshard", None)):
            reshard()


def once(action: Callable[[], Any], *, together: bool) -> None:
    """Run `action` on rank 0 alone.

    Args:
        together: all ranks wait for it and raise its exception (collective). If False, the others continue at once.
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
def explaining_failure(what: str) -> Iterator[None]:
    """Say what has failed, and what to do, where communication fails inside the block.

    Args:
        what: what has failed then, as a sentence without its full stop.

    Raises:
        PeftcoreError: communication has failed.
    """
    try:
        yield
    except RuntimeError as error:  # of gloo and NCCL
        if count() == 1 or isinstance(error, torch.OutOfMemoryError):
            raise
        raise PeftcoreError(
            f"{what}: {error}. If another rank has ended, read its output, and start the run again from its last "
            "checkpoint"
        ) from error


def of_first(value: T) -> T:
    """Rank 0's value, which can be pickled. Collective."""
    if count() == 1:
        return value
    message = [value]
    distributed.broadcast_object_list(message, src=0)
    return message[0]


@torch.no_grad()
def give(tensors: Iterable[Tensor]) -> None:
    """Copy rank 0's values of whole tensors to every rank, unless some are on the meta device. Collective."""
    tensors = [tensor for tensor in dict.fromkeys(tensors) if not is_part(tensor)]
    if any_of(any(tensor.is_meta for tensor in tensors)):  # accelerate fills them itself, from rank 0
        return
    for tensor in tensors:
        message = tensor.detach().to(message_device()).contiguous()
        distributed.broadcast(message, src=0)
        tensor.copy_(message)


def agree(facts: dict[str, Any], what: str) -> None:
    """Raise a PeftcoreError on every rank unless all give the same `facts`. Collective.

    Args:
        what: what the facts describe, for the message, such as `adapters`.
    """
    if count() == 1:
        return
    everyone: list[Any] = [None] * count()
    distributed.all_gather_object(everyone, facts)
    first = everyone[0]
    for number, others in enumerate(everyone):
        for name in [*first, *(name for name in others if name not in first)]:
            mine, theirs = first.get(name, "nothing"), others.get(name, "nothing")
            if mine != theirs:
                raise PeftcoreError(
                    f"ranks have different {what}: '{name}' is {mine} on rank 0, and {theirs} on rank {number}. "
                    "Load the same model on every rank, and apply with the same arguments"
                )


def difference(tensors: Mapping[str, Tensor]) -> tuple[str, int, float] | None:
    """Find a tensor that should have the same values on all ranks and has not. Collective.

    Sharded tensors are skipped. Rounding may differ by 1 % of the largest value.

    Returns:
        (name, rank, largest difference from rank 0), or None.
    """
    if count() == 1:
        return None
    plain = {name: tensor.detach() for name, tensor in tensors.items() if not is_part(tensor)}
    agree({name: f"{list(tensor.shape)} of {tensor.dtype}" for name, tensor in plain.items()}, "adapters")
    found: tuple[str, float] | None = None
    for name, tensor in plain.items():
        if not tensor.numel():
            continue
        mine = tensor.to(message_device(), torch.float32, copy=True).nan_to_num_()
        first = mine.clone(memory_format=torch.contiguous_format)
        distributed.broadcast(first, src=0)
        off = (mine - first).abs().max().item()
        if found is None and off > 0.01 * first.abs().max().item():
            found = name, off
    everyone: list[Any] = [None] * count()
    distributed.all_gather_object(everyone, found)
    return next(((each[0], number, each[1]) for number, each in enumerate(everyone) if each is not None), None)


def any_of(flag: bool) -> bool:
    """Return whether `flag` is true on any rank. Collective."""
    if count() == 1:
        return flag
    found = torch.tensor(int(flag), device=message_device())
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return bool(found)


def message_device() -> str:
    """Return the device of messages between ranks."""
    return "cuda" if distributed.get_backend() == "nccl" else "cpu"


def _running() -> bool:
    return distributed.is_available() and distributed.is_initialized()
