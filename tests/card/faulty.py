"""A table of cases that pass, fail, crash and hang, to test what runs them."""

import os
import time

import torch

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
    raise torch.AcceleratorError("CUDA error: unspecified launch failure")


def ends_its_process(place: Place) -> str:
    return "fine"


def comes_last(place: Place) -> None:
    pass


def crashes_again(place: Place, number: int) -> None:
    os._exit(9)


def all_cases() -> list[Case]:
    functions = (passes, fails, skips, crashes, breaks_the_card, hangs, comes_last)
    numbered = [Case("crashes_again", {"number": number}, crashes_again, emulated=True) for number in range(3)]
    ending = Case("ends_its_process", {}, ends_its_process, emulated=True, ends_process=True)
    return [ending, *(Case(function.__name__, {}, function, emulated=True) for function in functions), *numbered]
