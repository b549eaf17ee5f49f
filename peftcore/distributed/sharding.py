"""A model with adapters over the ranks: the frozen base sharded by `fully_shard`, the adapters replicated or sharded.

Packed 4-bit weights are parameters like any other and are sharded; their scales, a thirtieth of them, are buffers and
whole on every rank. Replicated adapters are the same on every rank, which their averaged gradients keep true:

    grad = 1/n · (grad of rank 0 + ... + grad of rank n-1)      one message a dtype, at the end of a backward pass
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.autograd import Variable
from torch.torch_version import TorchVersion

from peftcore.engine import adapter_parameters, state_of
from peftcore.engine.adaptation.division import has_plan
from peftcore.engine.replicas import between_blocks, blocks, check_ranks, give_adapters
from peftcore.engine.trained import TrainedParameters
from peftcore.errors import PeftcoreError
from peftcore.model.base_modules import base_modules
from peftcore.plugin import ranks
from peftcore.plugin.method import Model

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

CHOICES = ("replicate", "shard")
# transformers' Trainer averages replicated parameters itself unless they bear this mark.
_AVERAGED = "_replicated_grad_hook_registered"


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
        mesh: a `DeviceMesh` of one dimension, or of two for replicas of shards; None: all ranks.
        adapter_placement: "replicate" keeps adapters whole on every rank, as plain parameters for any optimizer and any
            number of ranks to resume; "shard" also shards large adapters. Parameters that blocks share stay whole.
        mixed_precision: a `torch.distributed.fsdp.MixedPrecisionPolicy`. 4-bit weights keep their bytes.
        offload: keep the shards in host memory (`CPUOffloadPolicy`).
        reshard_after_forward: free a block's whole weights after its forward; the backward pass gathers them again.

    Returns:
        `model`, with rank 0's values in the adapters.

    Raises:
        PeftcoreError: no distributed run has begun, the ranks have different models or adapters, an argument is
            wrong, or the base is quantized and PyTorch older than 2.12. The model is then unchanged.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    if adapter_placement not in CHOICES:
        raise PeftcoreError(f"adapter_placement must be one of {', '.join(CHOICES)}, found {adapter_placement!r}")
    check_running()
    if not isinstance(model, FSDPModule) and any(has_plan(module) for _, module in base_modules(model)):
        raise PeftcoreError(
            "tensor parallelism (tp_plan, tp_size) has divided the model over the ranks already, and adapters train on "
            "it as in one process: give every rank the same batch, and leave peftcore.shard out"
        )
    if TorchVersion(torch.__version__) < "2.12" and not all(p.is_floating_point() for p in model.parameters()):
        raise PeftcoreError(
            f"PyTorch {torch.__version__} cannot shard the integer weights of a quantized base; from 2.12 on it can. "
            "Upgrade PyTorch, or use DDP, with the base whole on every rank"
        )
    state = state_of(model)
    if state is not None and state.merged is not None:
        raise PeftcoreError("adapters are merged into the base. Shard after peftcore.unmerge, or a plain merged model")
    check_ranks(model)
    if (
        adapter_placement == "shard"
        and isinstance(model, FSDPModule)
        and not all(map(ranks.is_part, _of_adapters(model)))
    ):
        raise PeftcoreError("the base is sharded already: adapters that come afterwards can only be replicated")
    replicated, whole = divided(model, adapter_placement)
    give_adapters(model)
    if not isinstance(model, FSDPModule):
        options: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": mixed_precision or MixedPrecisionPolicy(),
            "offload_policy": CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy(),
            "ignored_params": whole,
        }
        for block in blocks(model):
            fully_shard(block, reshard_after_forward=reshard_after_forward, **options)
        fully_shard(model, **options)
    if replicated := [p for p in replicated if not hasattr(p, _AVERAGED)]:
        groups = [mesh.get_group(i) for i in range(mesh.ndim)] if mesh is not None else [distributed.group.WORLD]
        GradientMean(replicated, groups)
    return model


def check_running() -> None:
    """Raise a PeftcoreError unless a distributed run has begun."""
    if not (distributed.is_available() and distributed.is_initialized()):
        raise PeftcoreError(
            "no distributed run has begun. Start the script with `torchrun --nproc-per-node N script.py`, and call "
            "torch.distributed.init_process_group() first"
        )


def divided(model: nn.Module, adapter_placement: str) -> tuple[list[nn.Parameter], set[nn.Parameter]]:
    """Return (replicated adapter parameters, all unsharded parameters); the rest of the model is sharded.

    What a trained parameter has replaced takes no part in any forward: to gather it would be idle work.
    """
    between = between_blocks(model)
    plain = [p for p in _of_adapters(model) if not ranks.is_part(p)]
    replicated = [p for p in plain if adapter_placement == "replicate" or p in between]
    return replicated, {*_aside(model), *between, *replicated}


def _of_adapters(model: nn.Module) -> list[nn.Parameter]:
    state = state_of(model)
    names = list(state.applied) if state is not None else []
    return list(dict.fromkeys(p for name in names for _, p in adapter_parameters(model, name)))


class GradientMean:
    """Averages the gradients of replicated parameters over the ranks when a backward pass has ended."""

    def __init__(self, parameters: Sequence[nn.Parameter], groups: Sequence[Any]) -> None:
        self.parameters, self.groups = parameters, groups
        self.backward = -1  # autograd's number of the last backward pass that reached one of the parameters
        for parameter in parameters:
            trains = parameter.requires_grad  # a frozen or inactive adapter may train later
            parameter.requires_grad_(True).register_post_accumulate_grad_hook(self._note)
            parameter.requires_grad_(trains)
            setattr(parameter, _AVERAGED, True)

    def _note(self, parameter: Tensor) -> None:
        backward = torch._C._current_graph_task_id()
        if backward != self.backward:  # a pass that raised an error has never called its callbacks
            self.backward = backward
            # As DDP and FSDP do: clipping reads the means before the optimizer's step, and a hook on the gradients
            # (register_multi_grad_hook) would run before they are added to `grad`.
            Variable._execution_engine.queue_callback(self.average)

    @torch.no_grad()
    def average(self) -> None:
        """Replace each gradient by its mean over the ranks. Collective."""
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in self.parameters:
            if parameter.requires_grad:
                by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for parameters in by_dtype.values():
            # A 1 is sent with each gradient, so that parameters that no rank used stay without one.
            pieces = [p.grad.flatten() if p.grad is not None else torch.zeros_like(p).flatten() for p in parameters]
            used = torch.tensor([p.grad is not None for p in parameters], dtype=pieces[0].dtype).to(pieces[0].device)
            message = torch.cat([*pieces, used])
            for group in self.groups:
                distributed.all_reduce(message, group=group)
                message /= distributed.get_world_size(group)
            *means, used = message.split([*map(torch.numel, pieces), len(parameters)])
            for parameter, mean, share in zip(parameters, means, used.tolist(), strict=True):
                if parameter.grad is not None:
                    parameter.grad.copy_(mean.view_as(parameter))
                elif share:
                    parameter.grad = mean.view_as(parameter).clone()


def _aside(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield adapter-owned and replaced parameters that are not in the model now."""
    state = state_of(model)
    for name in state.applied if state else ():
        own = TrainedParameters.of(model, name)
        if own is not None:
            yield from own.parameters()
