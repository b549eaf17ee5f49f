"""A table of cases that pass, fail, crash and hang, to test what runs them."""

import os
import time

from card.table import Case, Place, Skip


def passes(place: Place) -> str:
    return "fine"


def fails(place: Place) -> None:
    raise AssertionError("wrong")


def skips(place: Place) -> None:
    raise Skip("not here")


def crashes(place: Place) -> None:
    os._exit(9)


def hangs(place: Place) -> None:
    time.sleep(600)


def breaks_the_card(place: Place) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def comes_last(place: Place) -> None:
    pass


def all_cases() -> list[Case]:
    functions = (passes, fails, skips, crashes, breaks_the_card, hangs, comes_last)
    return [Case(function.__name__, {}, function, emulated=True) for function in functions]
