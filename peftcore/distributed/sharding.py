"""Shard a model with adapters: the frozen base by `fully_shard`; adapters are replicated or sharded.

Packed 4-bit weights are parameters and are sharded like any other. Their scales, a thirtieth of their size, are buffers
and replicated. Replicated adapters stay equal on all ranks because their gradients are averaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import distributed, nn
from torch.torch_version import TorchVersion

from peftcore.distributed.gradients import average_gradients
from peftcore.distributed.process_group import check_running
from peftcore.engine import adapter_parameters, state_of
from peftcore.engine.adaptation.tensor_parallel import has_plan
from peftcore.engine.replicas import between_blocks, blocks, broadcast_adapters, check_ranks
from peftcore.engine.trained_parameters import TrainedParameters
from peftcore.errors import PeftcoreError
from peftcore.model.base_modules import base_modules
from peftcore.plugin import sharded
from peftcore.plugin.method import Model

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

CHOICES = ("replicate", "shard")


def shard(
    model: Model,
    mesh: DeviceMesh | None = None,
    *,
    adapter_placement: Literal["replicate", "shard"] = "replicate",
    mixed_precision: MixedPrecisionPolicy | None = None,
    offload: bool = False,
    reshard_after_forward: bool = True,
) -> Model:
    """Shard a model over the ranks of a distributed run (FSDP2), block by block. Collective.

    Args:
        mesh: a `DeviceMesh` with one dimension, or with two for hybrid sharding (replicas of shards); None for all
            ranks.
        adapter_placement: "replicate" keeps the full adapters on every rank as plain parameters, so that any optimizer
            works and training can resume on any number of ranks; "shard" shards them too. Parameters that several
            blocks share are not sharded.
        mixed_precision: a `torch.distributed.fsdp.MixedPrecisionPolicy`. It does not cast 4-bit weights.
        offload: keep the shards in host memory (`CPUOffloadPolicy`).
        reshard_after_forward: free a block's full weights after its forward; the backward pass gathers them again.

    Returns:
        `model`, with rank 0's values in the adapters.

    Raises:
        PeftcoreError: no distributed run has begun, the ranks have different models or adapters, an argument is
            wrong, or the base is quantized and PyTorch older than 2.12. The model is then unchanged.

    Examples:
        >>> peftcore.apply(model, "lora", r=16)
        >>> peftcore.shard(model)    # in a script that torchrun starts
    """
    from torch.distributed.fsdp import FSDPModule

    _refuse_unshardable(model, adapter_placement)
    replicated, full_parameters = divided(model, adapter_placement)
    broadcast_adapters(model)
    if not isinstance(model, FSDPModule):
        _shard_blocks(model, full_parameters, mesh, mixed_precision, offload, reshard_after_forward)
    groups = [distributed.group.WORLD] if mesh is None else [mesh.get_group(i) for i in range(mesh.ndim)]
    average_gradients(replicated, groups)
    return model


def _refuse_unshardable(model: nn.Module, adapter_placement: str) -> None:
    """Raise a PeftcoreError on every rank where `shard` would fail or compute something else. Collective."""
    from torch.distributed.fsdp import FSDPModule

    if adapter_placement not in CHOICES:
        raise PeftcoreError(f"adapter_placement must be one of {', '.join(CHOICES)}, found {adapter_placement!r}")
    check_running()
    is_sharded = isinstance(model, FSDPModule)
    if not is_sharded and any(has_plan(module) for _, module in base_modules(model)):
        raise PeftcoreError(
            "tensor parallelism (tp_plan, tp_size) has already sharded the model, so peftcore.shard is not needed. "
            "Train as in one process, with the same batch on every rank"
        )
    if TorchVersion(torch.__version__) < "2.12" and not all(p.is_floating_point() for p in model.parameters()):
        raise PeftcoreError(
            f"PyTorch {torch.__version__} cannot shard the integer weights of a quantized base. Upgrade to PyTorch "
            "2.12 or later, or use DDP, which replicates the base on every rank"
        )
    state = state_of(model)
    if state is not None and state.merged is not None:
        raise PeftcoreError(
            "cannot shard the model while adapters are merged into it. Call peftcore.unmerge(model) first, or merge "
            "without undo=True"
        )
    check_ranks(model)
    if is_sharded and adapter_placement == "shard" and not all(map(sharded.is_shard, _of_adapters(model))):
        raise PeftcoreError(
            "the base is already sharded, and adapters applied afterwards can only be replicated. Pass "
            "adapter_placement='replicate', or apply adapters before sharding"
        )


def _shard_blocks(
    model: nn.Module,
    full_parameters: set[nn.Parameter],
    mesh: DeviceMesh | None,
    mixed_precision: MixedPrecisionPolicy | None,
    offload: bool,
    reshard_after_forward: bool,
) -> None:
    """Shard every block, then the rest of the model, except for `full_parameters`."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": mixed_precision or MixedPrecisionPolicy(),
        "offload_policy": CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy(),
        "ignored_params": full_parameters,
    }
    for block in blocks(model):
        fully_shard(block, reshard_after_forward=reshard_after_forward, **options)
    fully_shard(model, **options)


def divided(model: nn.Module, adapter_placement: str) -> tuple[list[nn.Parameter], set[nn.Parameter]]:
    """Return (replicated adapter parameters, all unsharded parameters); the rest of the model is sharded.

    Base parameters that a trained copy has replaced are not sharded: no forward reads them, so gathering them would be
    wasted work.
    """
    parameters_between = between_blocks(model)
    plain = [p for p in _of_adapters(model) if not sharded.is_shard(p)]
    replicated = [p for p in plain if adapter_placement == "replicate" or p in parameters_between]
    return replicated, {*_aside(model), *parameters_between, *replicated}


def _of_adapters(model: nn.Module) -> list[nn.Parameter]:
    state = state_of(model)
    parameters: dict[nn.Parameter, None] = {}  # several adapters may train the same parameter
    for name in state.applied if state is not None else ():
        parameters.update((parameter, None) for _, parameter in adapter_parameters(model, name))
    return list(parameters)


def _aside(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the stored counterparts of trained parameters: those that the model does not use now."""
    state = state_of(model)
    for name in state.applied if state else ():
        owned = TrainedParameters.of(model, name)
        if owned is not None:
            yield from owned.parameters()
