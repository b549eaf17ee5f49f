"""Hooks of PyTorch's `parallelize_module`, which make DTensors of a layer's inputs and local tensors of its outputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def is_hook(hook: Any) -> bool:
    """Return whether a forward hook is that of a parallel style."""
    return inspect.isfunction(hook) and str(hook.__module__).startswith("torch.distributed.tensor")


def mesh_of_hooks(module: nn.Module) -> DeviceMesh | None:
    """Return the mesh over which a parallel style divides the work of `module`, or None if none does."""
    return next((each["device_mesh"] for each in _closures(module) if "device_mesh" in each), None)


def style_of_hooks(module: nn.Module) -> tuple[bool, DeviceMesh] | None:
    """Return (whether it is row-wise, mesh) of a layer under ColwiseParallel or RowwiseParallel; None for others."""
    found = [(each["input_fn"], each["device_mesh"]) for each in _closures(module) if "input_fn" in each]
    if len(found) != 1:
        return None
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    prepare, mesh = getattr(found[0][0], "func", None), found[0][1]
    kinds = {ColwiseParallel._prepare_input_fn: False, RowwiseParallel._prepare_input_fn: True}
    return (kinds[prepare], mesh) if prepare in kinds else None


def divides_tokens(model: nn.Module) -> bool:
    """Return whether a style divides activations along another dimension than the last (sequence parallelism)."""
    return any(
        _is_of_tokens(value) for module in model.modules() for each in _closures(module) for value in each.values()
    )


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Call `module` without the hooks of parallel styles inside the block."""
    tables = [module._forward_pre_hooks, module._forward_hooks]
    before = [dict(table) for table in tables]
    for table in tables:
        for key in [key for key, hook in table.items() if is_hook(hook)]:
            del table[key]
    try:
        yield
    finally:
        for table, hooks in zip(tables, before, strict=True):
            table.clear()
            table.update(hooks)


def _closures(module: nn.Module) -> Iterator[Mapping[str, Any]]:
    """Yield the variables of each hook: a layer's style, its layouts and mesh are nowhere else.

    The placements of its weight do not show how its inputs and outputs are divided (`input_layouts=Shard(1)`).
    """
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        if is_hook(hook):
            yield inspect.getclosurevars(hook).nonlocals


def _is_of_tokens(value: Any) -> bool:
    from torch.distributed.tensor import Shard

    if isinstance(value, (tuple, list)):
        return any(map(_is_of_tokens, value))
    if hasattr(value, "func") and hasattr(value, "args"):  # functools.partial with a style's layouts
        return _is_of_tokens(value.args)
    if type(value).__module__ == "torch.distributed.tensor.parallel.style":
        return any(map(_is_of_tokens, vars(value).values()))
    return type(value) is Shard and value.dim >= 0
