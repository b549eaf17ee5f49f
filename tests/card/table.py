"""The table of cases: a plain function that is run once for each combination of its arguments."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


class Skip(Exception):
    """A case cannot run here; the message says why."""


class Place(NamedTuple):
    """Where cases run: on a card, or on the CPU with the emulator's build of the operators."""

    device: torch.device
    emulated: bool = False

    def normal(self, *shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return normal numbers, of up to 2^20 elements the same on every device."""
        small = torch.Size(shape).numel() <= 2**20
        generator = torch.Generator("cpu" if small else self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=generator.device).to(self.device, dtype)


@dataclass(frozen=True)
class Case:
    """A call of a function of this folder, which raises AssertionError where a kernel is wrong.

    Args:
        function: name of the function.
        arguments: values by name.
        call: the function; returns a short text for the report, or None.
        emulated: whether the emulator runs the case, too.
        gigabytes: free memory that the case needs on a card.
        slow: whether it takes a minute, as what compiles or starts processes: such cases come last.
        ends_process: whether it changes its process, so that a new one must run the remaining cases.
    """

    function: str
    arguments: dict[str, Any]
    call: Callable[..., str | None]
    emulated: bool
    gigabytes: float = 0
    slow: bool = False
    ends_process: bool = False

    @property
    def name(self) -> str:
        values = (str(value).removeprefix("torch.") for value in self.arguments.values())
        return f"{self.function}[{'-'.join(values)}]" if self.arguments else self.function

    def run(self, place: Place) -> str | None:
        """Run the case.

        Raises:
            AssertionError: a kernel is wrong. Skip: the case cannot run here.
        """
        if not place.emulated and self.gigabytes:
            torch.cuda.empty_cache()  # what earlier cases left in PyTorch's cache is free
            if self.gigabytes * 1e9 > torch.cuda.mem_get_info()[0]:
                raise Skip(f"needs {self.gigabytes:g} GB of free memory on the card")
        return self.call(place, **self.arguments)


_CASES: list[Case] = []


def cases(
    emulated: Callable[..., bool] | bool = False,
    gigabytes: float = 0,
    slow: bool = False,
    ends_process: bool = False,
    every: int = 1,
    **axes: Iterable[Any],
) -> Callable[[Callable[..., str | None]], Callable[..., str | None]]:
    """Register a function once for each combination of the values of `axes`.

    Args:
        emulated: whether the emulator runs the case, for all or as a function of the arguments.
        gigabytes: free memory that a case needs on a card.
        slow: whether a case takes a minute.
        ends_process: whether a new process must run the remaining cases.
        every: only one of so many combinations is a case, picked by a hash of its name, next to those for the emulator.
        axes: values of each argument.
    """

    def register(function: Callable[..., str | None]) -> Callable[..., str | None]:
        for values in itertools.product(*axes.values()):
            arguments = dict(zip(axes, values, strict=True))
            here = emulated(**arguments) if callable(emulated) else emulated
            case = Case(function.__name__, arguments, function, here, gigabytes, slow, ends_process)
            if here or _hash(case.name) % every == 0:
                _CASES.append(case)
        return function

    return register


def one_in(count: int, *values: Any) -> bool:
    """Return True for one of so many combinations of values, always for the same ones."""
    return _hash(repr(values)) % count == 0


def _hash(name: str) -> int:
    return zlib.crc32(name.encode())


# If kernels do not launch on PyTorch's current stream, every other result is in doubt.
FIRST = "launches_on_the_current_stream"


def all_cases() -> list[Case]:
    """Return all cases, the most telling first: `FIRST`, of every function one, of every function a second one, etc.

    Of each round those come last that take much memory; behind all rounds those that are slow. Cases of a function are
    in a fixed order that looks drawn, so that the first ones differ in all arguments.
    """
    from card import (  # noqa: F401  they register cases
        entropy,
        experts,
        linear,
        lora,
        norms,
        optimizers,
        quant4,
        runtime,
        several,
    )

    return [case for _, case in sorted(_ranked(), key=lambda pair: pair[0])]


def _ranked() -> Iterator[tuple[tuple[bool, bool, int, float, str], Case]]:
    by_function: dict[str, list[Case]] = {}
    for case in _CASES:
        by_function.setdefault(case.function, []).append(case)
    for group in by_function.values():
        for rank, case in enumerate(sorted(group, key=lambda case: _hash(case.name))):
            yield (case.function != FIRST, case.slow, rank, case.gigabytes, case.name), case
