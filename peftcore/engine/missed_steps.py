"""Warning about training loops that do not call `after_step`, on which some methods depend.

PyTorch calls a hook after each step of any optimizer. It is registered while an adapter waits for its first
`after_step`; at the second optimizer step without one, a warning says so once.
"""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.compiler import is_dynamo_compiling
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from peftcore.engine.state import adapter_parameters, state_of
from peftcore.events import adapter_applied
from peftcore.registry import registry

_waiting: WeakSet[nn.Module] = WeakSet()  # models with an adapter that waits for its first `after_step`
_handles: list[RemovableHandle] = []  # the hook's handle while it is registered


def watch(model: nn.Module) -> None:
    """Count the optimizer steps on the adapter that was applied last to `model`, if its method needs `after_step`."""
    state = state_of(model)
    entry = next(reversed(state.applied.values()), None) if state is not None else None
    if entry is None:
        return
    method = registry.method(entry.method)
    if method.after_step is not None and method.needs_after_step(entry.config):
        entry.missed_steps = 0
        _waiting.add(model)
    if _waiting and not _handles:
        _handles.append(register_optimizer_step_post_hook(_stepped))


def _stepped(optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
    if is_dynamo_compiling():
        return
    for model in list(_waiting):
        state = state_of(model)
        if state is None or all(entry.missed_steps is None for entry in state.applied.values()):
            _waiting.discard(model)
            continue
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name in state.active:
            entry = state.applied[name]
            if entry.missed_steps is None or not entry.trainable or state.merged is not None:
                continue
            own = (parameter for _, parameter in adapter_parameters(model, name))
            if not any(id(parameter) in stepped and not parameter.is_meta for parameter in own):  # meta: an estimate
                continue
            entry.missed_steps += 1
            if entry.missed_steps == 2:
                entry.missed_steps = None
                warnings.warn(
                    f"the optimizer has taken two steps on the adapter '{name}' ({entry.method}) without "
                    "peftcore.after_step, so what its method does after each step (a projection, a schedule) is "
                    "missing. Call peftcore.after_step(model, step, total_steps), with the step counted from 1, after "
                    "each optimizer.step() and before optimizer.zero_grad(). transformers' Trainer does so by itself",
                    stacklevel=3,
                )
    if not _waiting:
        while _handles:
            _handles.pop().remove()


adapter_applied.subscribe(watch)
