"""Pipeline stages: each rank trains the adapters in its stage, and `join_stages` collects them for `save`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn

from peftcore.distributed.process_group import check_running
from peftcore.engine import adapter_modules, adapter_parameters, require_state
from peftcore.engine.replicas import check_ranks
from peftcore.errors import PeftcoreError
from peftcore.plugin import ranks


@torch.no_grad()
def join_stages(model: nn.Module, stage: nn.Module) -> nn.Module:
    """Copy the adapters in every rank's stage to all ranks, so that `save` writes the complete adapter. Collective.

    Args:
        model: the complete model, to which adapters were applied before it was split into stages; equal on all ranks
            except for the trained values.
        stage: this rank's stage: a module with layers of `model`, in any order and under any names.

    Returns:
        `model`.

    Raises:
        PeftcoreError: the ranks have different models or adapters, or a parameter of an adapter is in no stage, or in
            several. In these cases nothing is copied.
    """
    check_running()
    with ranks.explaining_failure("the stages could not be joined"):
        _join(model, stage)
    return model


def _join(model: nn.Module, stage: nn.Module) -> None:
    check_ranks(model)
    state = require_state(model)
    parameters: list[tuple[str, Tensor]] = []
    buffers: list[Tensor] = []
    for adapter in state.applied:
        parameters += adapter_parameters(model, adapter)
        for _, module in adapter_modules(model, adapter):
            buffers += module.buffers()
    tensors = [*(parameter for _, parameter in parameters), *buffers]
    owners = _owners(tensors, stage)
    _refuse_no_or_two_owners([name for name, _ in parameters], owners)
    for tensor, ranks_with in zip(tensors, owners, strict=True):
        message = tensor.detach().to(ranks.message_device()).contiguous()
        distributed.broadcast(message, src=ranks_with[0] if ranks_with else 0)
        tensor.copy_(message)


def _owners(tensors: Sequence[Tensor], stage: nn.Module) -> list[list[int]]:
    """Return {name of a tensor: the ranks whose stage has it}. Collective."""
    tensor_ids = {id(tensor) for tensor in (*stage.parameters(), *stage.buffers())}
    everyone: list[list[bool]] = [[]] * ranks.count()
    distributed.all_gather_object(everyone, [id(tensor) in tensor_ids for tensor in tensors])
    return [[rank for rank, has in enumerate(flags) if has] for flags in zip(*everyone, strict=True)]


def _refuse_no_or_two_owners(names: Sequence[str], owners: Sequence[list[int]]) -> None:
    """Raise a PeftcoreError unless each parameter is in exactly one rank's stage.

    `tensors` lists parameters before buffers.
    """
    for name, ranks_with in zip(names, owners, strict=False):
        if not ranks_with:
            raise PeftcoreError(
                f"no stage contains the adapter parameter '{name}'. Build the stages from the layers of this model, "
                "not from copies, and give each rank a different stage. Adapters around the complete model, such as "
                "prompts, are in no stage: use another method"
            )
        if len(ranks_with) > 1:
            raise PeftcoreError(
                f"the stages of ranks {ranks_with} share the adapter parameter '{name}', and each rank has trained "
                "its own copy. Use a method whose layers do not share parameters"
            )
