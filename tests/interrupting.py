"""Interruption of a function at the lines of some files, as Ctrl-C may, or an allocation that fails."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_MOST = 400  # lines


class Interrupted(BaseException):
    """What is raised."""


def interrupted(make: Callable[[], T], function: Callable[[T], Any], files: tuple[str, ...]) -> Iterator[tuple[T, str]]:
    """Run `function` once for each line of `files` that it reaches, and interrupt it before that line.

    A line that is reached several times is interrupted the first and the last time.

    Args:
        make: makes the argument.
        function: what is interrupted.
        files: ends of the paths of source files.

    Yields:
        (the argument after the interruption, the line)
    """
    function(make())  # what is made once
    seen = _lines(lambda: function(argument), files) if (argument := make()) is not None else []
    first = {line: number for number, line in reversed(list(enumerate(seen)))}
    last = {line: number for number, line in enumerate(seen)}
    numbers = sorted({*first.values(), *last.values()})
    assert len(numbers) <= _MOST, f"{len(numbers)} lines, name fewer files"
    for number in numbers:
        argument = make()
        try:
            _lines(lambda argument=argument: function(argument), files, stop=number)  # type: ignore[misc]
        except Interrupted:
            yield argument, seen[number]
        else:
            raise AssertionError(f"Interrupted at {seen[number]} was caught")


def _lines(call: Callable[[], Any], files: tuple[str, ...], stop: int = -1) -> list[str]:
    """Return the lines of `files` that `call` reaches; raise Interrupted before line number `stop`."""
    seen: list[str] = []

    def in_frame(frame: Any, event: str, _argument: Any) -> Any:
        if event == "line":
            seen.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
            if len(seen) == stop + 1:
                sys.settrace(None)
                raise Interrupted
        return in_frame

    def in_call(frame: Any, _event: str, _argument: Any) -> Any:
        return in_frame if frame.f_code.co_filename.endswith(files) else None

    before, gradients = sys.gettrace(), torch.is_grad_enabled()
    sys.settrace(in_call)
    try:
        call()
    finally:
        sys.settrace(before)
        torch.set_grad_enabled(gradients)  # Python leaves a block unfinished if its last line is interrupted
    return seen
