"""Call arguments that are passed to adapters rather than to the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from peftcore.adaptation.call import CallContext, context_for
from peftcore.engine.state import State, require_state
from peftcore.errors import PeftcoreError, nearest


@contextmanager
def call_arguments(model: nn.Module, **values: Any) -> Iterator[None]:
    """Pass `values`, such as task_ids, to the adapters in each call of `model` inside the block.

    `model(..., task_ids=t)` does it for one call, and takes precedence. The block affects the thread (and asyncio task)
    that entered it. `generate` repeats tensors for the beams of each row.

    Raises:
        PeftcoreError: no adapter is applied, or none reads an argument of that name.
    """
    context = require_state(model).lock.context
    names = context.names if context is not None else frozenset()
    for name in values:
        if name not in names:
            there = f"They read: {', '.join(sorted(names))}" if names else "They read no arguments"
            raise PeftcoreError(f"no adapter of the model reads the argument '{name}'{nearest(name, names)}. {there}")
    if context is None:
        yield
        return
    with context.given(values):
        yield


def update_call_context(state: State) -> None:
    """Make calls of the model known to adapters (active or not) and losses that read them, and with `per_sample`."""
    before = state.lock.context
    reads = [entry.reads for entry in state.applied.values() if entry.reads is not None]
    state.lock.context = context_for(reads, before)
    keeping = frozenset(name for name, entry in state.applied.items() if entry.keeps_calls)
    if keeping or state.samples is not None:
        require_call_context(state)
    if state.lock.context is not None:
        state.lock.context.keeping = keeping


def require_call_context(state: State) -> None:
    """Make calls of the model known, from which the number of tokens of each sample is read."""
    if state.lock.context is None:
        state.lock.context = CallContext()
