"""Reading of sharded base parameters while adapters are applied.

Two kinds of parameters are sharded: DTensors (FSDP2, tensor parallelism), and parameters partitioned by DeepSpeed's
ZeRO-3. The latter have no elements between calls: their shape is `ds_shape`, and DeepSpeed gathers them.

Functions marked collective must be called by every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_map_only

from peftcore.errors import PeftcoreError

if TYPE_CHECKING:
    from torch._ops import OpOverload
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def has_process_group() -> bool:
    """Return whether `torch.distributed` is initialized."""
    return distributed.is_available() and distributed.is_initialized()


def is_sharded(module: nn.Module) -> bool:
    """Return whether every rank holds only a shard of some parameters of `module`."""
    if not has_process_group():
        # The process group that sharded a model may have been destroyed. All parameters are then shards, so checking
        # one suffices.
        return any(map(is_shard, islice(module.parameters(), 1)))
    return any(map(is_shard, module.parameters()))


def is_shard(tensor: Tensor) -> bool:
    """Return whether this rank holds only a shard of `tensor`: it is a DTensor, or ZeRO-3 has partitioned it."""
    return is_dtensor(tensor) or is_zero3(tensor)


def any_shards(tensors: Iterable[Tensor]) -> bool:
    """Return whether `is_shard` holds for any of `tensors`, in a single call."""
    return bool([tensor for tensor in tensors if hasattr(tensor, "full_tensor") or hasattr(tensor, "ds_id")])


def is_dtensor(tensor: Tensor) -> TypeIs[DTensor]:
    """Return whether `tensor` is a DTensor."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, sharing its memory. Any other tensor is returned unchanged."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def is_zero3(tensor: Tensor) -> bool:
    """Return whether `tensor` is a parameter partitioned by DeepSpeed's ZeRO-3, even if it is currently gathered."""
    return hasattr(tensor, "ds_id")


def shape_of(tensor: Tensor) -> torch.Size:
    """Return the shape of the full tensor, even if ZeRO-3 left no elements of it on this rank."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def whole(tensor: Tensor) -> Tensor:
    """Return the detached tensor. A sharded tensor is gathered, which is collective."""
    if is_zero3(tensor):
        with gathered([tensor]):
            return tensor.detach().clone()
    tensor = tensor.detach()
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


@contextmanager
def gathered(tensors: Iterable[Tensor], *, write: bool = False) -> Iterator[None]:
    """Gather the ZeRO-3 parameters among `tensors` within the block. Collective if there are any.

    Args:
        write: whether to keep rank 0's changes to them in the block, also in the optimizer's float32 copy.
    """
    zero3_parameters = [tensor for tensor in dict.fromkeys(tensors) if is_zero3(tensor)]
    if not write:  # DeepSpeed keeps small parameters gathered, which suffices for reading
        zero3_parameters = [tensor for tensor in zero3_parameters if tensor.shape != shape_of(tensor)]
    if not zero3_parameters:
        yield
        return
    import deepspeed  # type: ignore[import-not-found, import-untyped, unused-ignore]  # optional

    with deepspeed.zero.GatheredParameters(zero3_parameters, modifier_rank=0 if write else None):
        yield
    for parameter in zero3_parameters if write else ():
        if getattr(parameter, "_z3_optimizer", None) is not None:  # otherwise no optimizer trains it
            deepspeed.utils.safe_set_local_fp32_param(parameter, cast(Any, parameter).ds_tensor)


class GatheredWhenRead(Tensor):
    """Proxy for a sharded parameter with the shape of the full tensor. Operators on it gather the full tensor."""

    _is_param = True  # so that it is an instance of nn.Parameter
    shard: Tensor

    @staticmethod
    def __new__(cls, shard: Tensor) -> GatheredWhenRead:
        stand_in = Tensor._make_wrapper_subclass(
            cls, shape_of(shard), dtype=shard.dtype, device=shard.device, requires_grad=shard.requires_grad
        )
        stand_in.shard = shard
        return stand_in

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"GatheredWhenRead({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operator: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outputs = [arg for arg, value in zip(args, operator._schema.arguments, strict=False) if value.is_write]
        if any(isinstance(output, GatheredWhenRead) for output in outputs):
            raise PeftcoreError(
                "cannot change the base's weights while an adapter is applied, because they are sharded"
            )
        full_args = tree_map_only(GatheredWhenRead, _read, args)
        return operator(*full_args, **tree_map_only(GatheredWhenRead, _read, kwargs or {}))


def _read(stand_in: GatheredWhenRead) -> Tensor:
    return whole(stand_in.shard)


def original(tensor: Tensor) -> Tensor:
    """Return the sharded parameter behind a proxy of `gathered_when_read`. Any other tensor is returned unchanged."""
    return tensor.shard if isinstance(tensor, GatheredWhenRead) else tensor


@contextmanager
def gathered_when_read(model: nn.Module) -> Iterator[None]:
    """Make reads of sharded parameters inside the block return the full parameter. Collective.

    Parameters are gathered one by one, and only if their values are read. If some parameters stay sharded in forward
    passes, no forward pass may run inside the block.
    """
    if not is_sharded(model):
        yield
        return
    slots = [
        (module._parameters, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and is_shard(parameter)
    ]
    # By identity, so that tied parameters stay tied.
    stand_ins = {id(parameter): cast(nn.Parameter, GatheredWhenRead(parameter)) for _, _, parameter in slots}
    for parameters, name, parameter in slots:
        parameters[name] = stand_ins[id(parameter)]
    try:
        yield
    finally:
        for parameters, name, parameter in slots:
            if isinstance(parameters[name], GatheredWhenRead):  # a forward pass of FSDP2 restores its own parameter
                parameters[name] = parameter


def modules_with_fsdp(module: nn.Module, fsdp: bool = False) -> Iterator[tuple[bool, nn.Module]]:
    """Yield (whether FSDP2 gathers its parameters for a forward pass, module) for `module` and all submodules."""
    fsdp = fsdp or hasattr(module, "unshard")
    yield fsdp, module
    for child in module.children():
        yield from modules_with_fsdp(child, fsdp)


def has_divided(module: nn.Module) -> bool:
    """Return whether a parameter of `module` stays sharded in a forward pass, as in tensor parallelism."""
    for fsdp, child in modules_with_fsdp(module):
        for parameter in child._parameters.values():
            if parameter is not None and is_tensor_parallel(original(parameter), fsdp=fsdp):
                return True
    return False


def is_tensor_parallel(tensor: Tensor, *, fsdp: bool) -> bool:
    """Return whether `tensor` stays sharded in a forward pass, as in tensor parallelism.

    Args:
        fsdp: whether FSDP2 gathers the tensor along one dimension of its mesh.
    """
    return is_dtensor(tensor) and sum(not placement.is_replicate() for placement in tensor.placements) > fsdp


@contextmanager
def gathered_parameters(module: nn.Module) -> Iterator[nn.Module]:
    """Replace the sharded parameters of `module` with full parameters inside the block. Collective if there are any."""
    slots = [
        (child, name, parameter)
        for child in module.modules()
        for name, parameter in child._parameters.items()
        if parameter is not None and is_shard(parameter)
    ]
    for owner, name, parameter in slots:
        owner._parameters[name] = nn.Parameter(whole(parameter), parameter.requires_grad)
    try:
        yield module
    finally:
        for owner, name, parameter in slots:
            owner._parameters[name] = parameter


def fill(parameter: Tensor, value: Tensor) -> None:
    """Copy a full `value` into `parameter`; for a DTensor, copy this rank's shard.

    ZeRO-3 parameters must be `gathered`.
    """
    if is_dtensor(parameter):
        parameter.to_local().copy_(sharded_like(value, parameter).to_local())
    else:
        parameter.copy_(value)


def sharded_like(value: Tensor, like: DTensor) -> DTensor:
    """Shard `value`, which every rank has, like `like`, without communication."""
    from torch.distributed.tensor import distribute_tensor

    value = value.detach().to(like.device_mesh.device_type, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def refuse_sharded(module: nn.Module, action: str) -> None:
    """Raise a PeftcoreError if `module` is sharded. `action`: the operation that is not possible, such as `merge`."""
    if is_sharded(module):
        raise PeftcoreError(
            f"cannot {action}: the model is sharded, so no rank has the full weight. Save the adapter, and {action} "
            "in a single process"
        )


def reshard(module: nn.Module) -> None:
    """Make `fully_shard` free full parameters that a forward left in their slots."""
    if not has_process_group() or distributed.get_world_size() == 1:
        return
    for child in module.modules():
        if hasattr(child, "unshard") and (reshard := getattr(child, "reshard", None)):
            reshard()
