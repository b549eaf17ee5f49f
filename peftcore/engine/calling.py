"""What adapters are told of a call of their model beside its own arguments."""

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
    """Within the block each call of `model` gives its adapters `values`, such as task_ids, too.

    As `model(..., task_ids=t)` does for one call, which comes before. It holds in the thread (and asyncio task) that
    entered the block. `generate` repeats tensors for each row's beams.

    Raises:
        PeftcoreError: no adapter is applied, or none reads an argument of that name.
    """
    context = require_state(model).lock.context
    names = context.names if context is not None else frozenset()
    for name in values:
        if name not in names:
            there = f"They read: {', '.join(sorted(names))}" if names else "They read none"
            raise PeftcoreError(f"no adapter of the model reads an argument '{name}'{nearest(name, names)}. {there}")
    if context is None:
        yield
        return
    with context.given(values):
        yield


def ask_of_calls(state: State) -> None:
    """Let calls of `model` be noted for adapters that read them, active or not, and where samples have their own."""
    before = state.lock.context
    reads = [entry.reads for entry in state.applied.values() if entry.reads is not None]
    state.lock.context = context_for(reads, before)
    if state.lock.context is None and state.samples is not None:
        note_calls(state)


def note_calls(state: State) -> None:
    """Let calls of the model be noted, which tell how many tokens a sample has."""
    if state.lock.context is None:
        state.lock.context = CallContext()
