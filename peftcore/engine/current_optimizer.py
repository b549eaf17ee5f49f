"""The optimizer that has just stepped, for methods whose `after_step` resets optimizer state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Adagrad, Optimizer

from peftcore.errors import PeftcoreError
from peftcore.optim.base import FusedOptimizer, is_among_largest
from peftcore.plugin import sharded

_OPTIMIZER: ContextVar[tuple[Optimizer | None, ...]] = ContextVar("peftcore_optimizer", default=())


def unwrapped(optimizer: Any) -> Optimizer | None:
    """Return the PyTorch optimizer inside accelerate's wrapper, if there is one; None for None.

    Raises:
        PeftcoreError: `optimizer` is not an optimizer.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise PeftcoreError(f"optimizer must be a torch.optim.Optimizer, found {type(optimizer).__name__}")
    return optimizer


@contextmanager
def stepping(optimizer: Optimizer | None) -> Iterator[None]:
    """Make `current_optimizer` return `optimizer` in the block; None if the loop did not pass it."""
    token = _OPTIMIZER.set((optimizer,))
    try:
        yield
    finally:
        _OPTIMIZER.reset(token)


def current_optimizer() -> Optimizer:
    """Return the optimizer that has just stepped, for a method's `after_step`.

    Raises:
        PeftcoreError: no `after_step` is running, or the training loop did not pass the optimizer.
    """
    running = _OPTIMIZER.get()
    if not running:
        raise PeftcoreError("current_optimizer() was called outside after_step. Call it only in a method's after_step")
    (optimizer,) = running
    if optimizer is None:
        raise PeftcoreError(
            "the method's after_step needs the optimizer. Pass it: "
            "peftcore.after_step(model, step, total_steps, optimizer=optimizer)"
        )
    return optimizer


def reset_optimizer_state(parameters: Iterable[nn.Parameter], *, keep: float = 0.0) -> None:
    """Reset the state of `parameters` in the optimizer that has just stepped; for a method's `after_step`.

    For these parameters the next step is like the first one: moments are zero, and the step count starts again.
    Learning rates, groups and the state of other parameters do not change.

    Args:
        parameters: parameters that the optimizer trains.
        keep: fraction of the moments to keep, in [0, 1]; above 0, the step count is kept too. An element keeps its
            moments if each moment is within this fraction of the largest magnitudes. Otherwise all its moments are set
            to zero, since a first moment divided by a second moment of zero would give a huge step. With 1 nothing
            changes, but errors are still raised.

    Raises:
        PeftcoreError: as for `current_optimizer`; or the optimizer does not have these parameters, cannot recreate its
            state, or has state that cannot be kept in part.
    """
    optimizer = current_optimizer()
    kind = type(optimizer).__name__
    if isinstance(optimizer, (Adagrad, LBFGS)):
        raise PeftcoreError(
            f"{kind} cannot reset the state of single parameters, because it does not create missing state in "
            "step(). Use AdamW or another optimizer that does"
        )
    to_reset = list(parameters)
    optimizer_ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing_count = sum(id(parameter) not in optimizer_ids for parameter in to_reset)
    if missing_count:
        raise PeftcoreError(
            f"{kind} does not have {missing_count} of the {len(to_reset)} parameters whose state should be reset. Pass "
            "the optimizer that trains them; optimizers that update copies of parameters, such as those of DeepSpeed, "
            "are not supported"
        )
    for parameter in to_reset:
        if keep:
            _keep_largest(optimizer, parameter, keep)
        else:
            optimizer.state.pop(parameter, None)


def _keep_largest(optimizer: Optimizer, parameter: nn.Parameter, keep: float) -> None:
    if not optimizer.state.get(parameter):  # a parameter without gradients so far
        return
    if isinstance(optimizer, FusedOptimizer):
        if keep < 1:
            optimizer.keep_largest(parameter, keep)
        return
    moments = {name: value for name, value in optimizer.state[parameter].items() if isinstance(value, Tensor)}
    for name, value in moments.items():
        if value.dim() and (value.shape != parameter.shape or not value.is_floating_point()):
            raise PeftcoreError(
                f"the state '{name}' of {type(optimizer).__name__} cannot be reset in part: it is {value.dtype} of "
                f"shape {list(value.shape)} for a parameter of shape {list(parameter.shape)}. Reset all of the state "
                "(keep=0), or use AdamW of PyTorch or of peftcore.optim"
            )
    if keep >= 1:
        return
    full_moments = {name: sharded.whole(value) for name, value in moments.items() if value.dim()}
    if full_moments:
        mask = is_among_largest(list(full_moments.values()), keep)
        for name, value in full_moments.items():
            sharded.fill(moments[name], value * mask)
