"""Average the gradients of replicated parameters over the ranks, and clip them together with sharded gradients.

grad = 1/n · (grad of rank 0 + ... + grad of rank n-1)      one message per dtype, when a backward pass ends
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, distributed, nn
from torch.autograd import Variable

from peftcore.plugin import sharded

# transformers' Trainer averages replicated parameters itself unless they have this attribute.
_AVERAGED = "_replicated_grad_hook_registered"


def average_gradients(parameters: Iterable[nn.Parameter], groups: Sequence[distributed.ProcessGroup | None]) -> None:
    """Average the gradients of `parameters` over the ranks of `groups` after every backward pass from now on."""
    parameters = [parameter for parameter in parameters if not hasattr(parameter, _AVERAGED)]
    if parameters:
        GradientMean(parameters, groups)


class GradientMean:
    """Averages the gradients of replicated parameters over the ranks when a backward pass has ended."""

    def __init__(self, parameters: Sequence[nn.Parameter], groups: Sequence[distributed.ProcessGroup | None]) -> None:
        self.parameters, self.groups = parameters, groups
        self.backward = -1  # autograd's number of the last backward pass that reached one of the parameters
        for parameter in parameters:
            trains = parameter.requires_grad  # a frozen or inactive adapter may train later
            parameter.requires_grad_(True).register_post_accumulate_grad_hook(self._note)
            parameter.requires_grad_(trains)
            setattr(parameter, _AVERAGED, True)

    def _note(self, parameter: Tensor) -> None:
        backward = torch._C._current_graph_task_id()
        if backward != self.backward:  # a pass that raised an error did not run its callbacks
            self.backward = backward
            # Average at the end of the backward pass, like DDP and FSDP: clipping reads the means before the
            # optimizer's step, and a hook on the gradients (register_multi_grad_hook) would run before they are added
            # to `grad`.
            Variable._execution_engine.queue_callback(self.average)

    @torch.no_grad()
    def average(self) -> None:
        """Replace each gradient by its mean over the ranks. Collective."""
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in self.parameters:
            if parameter.requires_grad:
                by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for parameters in by_dtype.values():
            self._average(parameters)

    def _average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average gradients of one dtype.

        Each rank also sends a flag per gradient; a parameter that no rank used keeps no gradient.
        """
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        is_used = torch.tensor([float(p.grad is not None) for p in parameters]).to(gradients[0])
        message = torch.cat([*(gradient.flatten() for gradient in gradients), is_used])
        for group in self.groups:
            distributed.all_reduce(message, group=group)
            message /= distributed.get_world_size(group)
        *means, is_used = message.split([*(gradient.numel() for gradient in gradients), len(parameters)])
        for parameter, mean, share in zip(parameters, means, is_used.tolist(), strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(mean.view_as(parameter))
            elif share:
                parameter.grad = mean.view_as(parameter).clone()


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scale gradients so that their norm is at most `max_norm`, like `torch.nn.utils.clip_grad_norm_`. Collective.

    PyTorch's function fails if only some of the parameters are DTensors. That happens under expert parallelism:
    adapters on experts are DTensors, and adapters on other layers are plain tensors.

    Returns:
        The norm before clipping: a plain tensor with the same value on every rank.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    groups: dict[object, list[Tensor]] = {}
    for gradient in gradients:
        groups.setdefault(gradient.device_mesh if sharded.is_dtensor(gradient) else None, []).append(gradient)
    norms = [torch.nn.utils.get_total_norm(group, norm_type, foreach=False) for group in groups.values()]
    if not norms:
        return torch.tensor(0.0)
    total = torch.linalg.vector_norm(torch.stack([sharded.whole(norm) for norm in norms]), norm_type)
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local = gradient.to_local() if sharded.is_dtensor(gradient) else gradient
        local.mul_(factor.to(local.device))
    return total
