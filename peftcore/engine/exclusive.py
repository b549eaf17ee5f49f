"""Exclusive access for functions that change a model: no other thread calls or changes it meanwhile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import nn

from peftcore.adaptation.concurrency import refuse_running
from peftcore.engine.state import check_model, state_of

Function = TypeVar("Function", bound=Callable[..., Any])


def exclusive(what: str, *, base: bool = False) -> Callable[[Function], Function]:
    """Decorate a function that changes a model, its first argument, to run without calls or changes by other threads.

    Args:
        what: what the function does, for messages, such as `merge`.
        base: the base changes, too, so the function waits for open `disabled` blocks of other threads.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def changing(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            check_model(model)
            state = state_of(model)
            if state is None:
                refuse_running(model, what)
                return function(model, *args, **kwargs)
            with state.lock.changing(what, base=base):
                return function(model, *args, **kwargs)

        return cast(Function, changing)

    return decorate
