"""Registry of the checks and their names in reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peftcore.testing.case import Case

Function = Callable[[Case], str | None]


@dataclass(frozen=True)
class Check:
    """One check of a method.

    Args:
        name: name of the check in reports and in `not_applicable`.
        run: (case) -> None if the check passes, or the reason why it does not apply; raises if it fails.
        essential: run the check on every family, not only on the first.
        refused: a method that cannot pass must raise a PeftcoreError; wrong values cannot be excused.
    """

    name: str
    run: Function
    essential: bool = False
    refused: bool = False


CHECKS: dict[str, Check] = {}


def check(name: str, *, essential: bool = False, refused: bool = False) -> Callable[[Function], Function]:
    """Register a function as the check `name`; see `Check`."""

    def decorate(function: Function) -> Function:
        CHECKS[name] = Check(name, function, essential, refused)
        return function

    return decorate


def name_of(function: Function) -> str:
    """Return the name of the check that `function` implements."""
    return next(check.name for check in CHECKS.values() if check.run is function)
