"""What makes a function a check: its docstring is what reports call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peftcore.testing.case import Case

Function = Callable[[Case], str | None]


@dataclass(frozen=True)
class Check:
    """One check.

    Args:
        run: (case) -> None where it holds, or why it has nothing to check here. It raises where it does not hold.
        essential: it runs on every family, not on the first alone.
        refused: a method that cannot pass it must refuse with a PeftcoreError; wrong values are no excuse.
    """

    name: str
    run: Function
    essential: bool = False
    refused: bool = False


CHECKS: dict[str, Check] = {}


def check(*, essential: bool = False, refused: bool = False) -> Callable[[Function], Function]:
    """Make a function a check, see :class:`Check`."""

    def decorate(function: Function) -> Function:
        name = name_of(function)
        CHECKS[name] = Check(name, function, essential, refused)
        return function

    return decorate


def name_of(function: Function) -> str:
    """What the check that this function is is called."""
    return (function.__doc__ or "").strip().rstrip(".")
