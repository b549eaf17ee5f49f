"""Stages of a pipeline: each rank trains the adapters in its part of a model, and `save` needs all of them."""

from __future__ import annotations

import torch
from torch import distributed, nn

from peftcore.distributed.process_group import check_running
from peftcore.engine import adapter_modules, adapter_parameters, require_state
from peftcore.engine.replicas import check_ranks
from peftcore.errors import PeftcoreError
from peftcore.plugin import ranks


@torch.no_grad()
def join_stages(model: nn.Module, stage: nn.Module) -> nn.Module:
    """Copy the adapters of every rank's stage to all ranks, so that `save` writes the whole adapter. Collective.

    Args:
        model: the whole model, to which adapters were applied before it was cut; equal on all ranks but for training.
        stage: this rank's part of it: a module with layers of `model`, in any order and under any name.

    Returns:
        `model`.

    Raises:
        PeftcoreError: the ranks have different models or adapters, or a parameter of an adapter is in no stage, or in
            several. Nothing is copied then.
    """
    check_running()
    with ranks.explaining_failure("the stages could not be joined"):
        _join(model, stage)
    return model


def _join(model: nn.Module, stage: nn.Module) -> None:
    check_ranks(model)
    state = require_state(model)
    named = [(name, p) for adapter in state.applied for name, p in adapter_parameters(model, adapter)]
    modules = [each for adapter in state.applied for _, each in adapter_modules(model, adapter)]
    buffers = [(name, buffer) for each in modules for name, buffer in each.named_buffers()]
    inside = {id(tensor) for tensor in (*stage.parameters(), *stage.buffers())}
    everyone: list[list[bool]] = [[]] * ranks.count()
    distributed.all_gather_object(everyone, [id(tensor) in inside for _, tensor in named + buffers])
    owners = [[rank for rank, has in enumerate(everyone) if has[i]] for i in range(len(named + buffers))]
    for (name, _), found in zip(named, owners, strict=False):
        if not found:
            raise PeftcoreError(
                f"no stage has the adapter parameter '{name}'. Build each stage of the layers of this model, not of "
                "copies, and give every rank its own. An adapter around the whole model, such as a prompt, is in no "
                "stage: use another method"
            )
        if len(found) > 1:
            raise PeftcoreError(
                f"the stages of ranks {found} share the adapter parameter '{name}', and each has trained its own copy. "
                "Use a method whose layers share no parameters"
            )
    for (_, tensor), found in zip(named + buffers, owners, strict=True):
        message = tensor.detach().to(ranks.message_device()).contiguous()
        distributed.broadcast(message, src=found[0] if found else 0)
        tensor.copy_(message)
