"""Rates of products in fp32, bf16 and fp16 on this CPU, which decide in which dtype a model computes fast.

    forward     x Wᵀ        of 256 x 256 x 256
    backward    dy W        another layout, for which a CPU without instructions for the dtype may use another loop
    share       time of both products in fp32 / in the dtype

A CPU without bf16 instructions multiplies bf16 20 to 60 times slower than fp32. The measurement takes less than two
seconds and is kept in a file, so that two commands choose the same dtype. It uses one thread: when other programs keep
a core busy, threads wait for each other and every dtype seems equally slow.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftcore.estimating.measurements import Measurement

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FAST = 0.5  # share of fp32's rate from which a dtype of half the memory is worth it
_SIZE = 256
_SECONDS, _SLOW = 0.6, 0.1  # for all rounds; a slower product is measured once


class DtypeRate(NamedTuple):
    """Floating-point operations per second in one dtype, for x Wᵀ (`forward`) and dy W (`backward`)."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        """Operations per second over one product of each kind."""
        return 2 / (1 / self.forward + 1 / self.backward)


class DtypeRates(NamedTuple):
    """Rates of one thread of this machine."""

    fp32: DtypeRate
    bf16: DtypeRate
    fp16: DtypeRate

    def of(self, dtype: str) -> DtypeRate:
        """Return the rate of a dtype, by its name in `DTYPES`."""
        return self[tuple(DTYPES).index(dtype)]

    def share(self, dtype: str) -> float:
        """Return the dtype's rate as a share of fp32's."""
        return self.of(dtype).both / self.fp32.both

    def is_fast(self, dtype: str) -> bool:
        """Return whether the dtype is multiplied at no less than half of fp32's rate."""
        return self.share(dtype) >= FAST

    def sentence(self, dtype: str) -> str:
        """Compare the dtype with fp32: `at 0.02 of fp32's rate on this processor (1.2 of 53 GFLOP/s per core)`."""
        own, wide = (gigaflops(self.of(name).both) for name in (dtype, "fp32"))
        return f"at {self.share(dtype):.2g} of fp32's rate on this processor ({own} of {wide} GFLOP/s per core)"


def gigaflops(rate: float) -> str:
    """Return a rate in GFLOP/s, with at least two digits."""
    return f"{rate / 1e9:,.0f}" if rate >= 10e9 else f"{rate / 1e9:.2g}"


def measure(clock: Callable[[], float] = time.perf_counter) -> DtypeRates:
    """Measure all rates: the shortest time of several rounds over all products."""
    calls: dict[tuple[str, str], Callable[[], Tensor]] = {}
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad(), _one_thread():
        torch.manual_seed(0)
        wide = torch.randn(2, _SIZE, _SIZE)
        for name, dtype in DTYPES.items():
            x, w = wide.to(dtype)
            calls[name, "forward"] = functools.partial(torch.mm, x, w.t())
            calls[name, "backward"] = functools.partial(torch.mm, x, w)
        shortest = {each: _seconds(call, clock) for each, call in calls.items()}  # includes the libraries' preparation
        end, again = clock() + _SECONDS, [each for each, taken in shortest.items() if taken < _SLOW]
        for number in range(40):
            if number >= 2 and clock() >= end:
                break
            for each in again:
                shortest[each] = min(shortest[each], _seconds(calls[each], clock))
    flops = 2 * _SIZE**3
    return DtypeRates(*(DtypeRate(flops / shortest[d, "forward"], flops / shortest[d, "backward"]) for d in DTYPES))


_ONE_THREAD = RLock()


@contextmanager
def _one_thread() -> Iterator[None]:
    with _ONE_THREAD:  # overlapping calls would restore each other's number
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _seconds(call: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return max(1e-9, clock() - start)


def read(found: Mapping[str, Any]) -> DtypeRates:
    """Return the rates that an entry of the file describes.

    Raises:
        KeyError, TypeError, ValueError: The entry has another format.
    """
    rates = DtypeRates(**{name: DtypeRate(*map(float, found[name])) for name in DTYPES})
    if not all(0 < each < float("inf") for rate in rates for each in rate):
        raise ValueError("rates must be positive")
    return rates


_RATES = Measurement("dtypes.json", read, measure, DtypeRates._asdict)


@functools.cache
def here() -> DtypeRates:
    """Return this machine's rates, read from the file or measured, once per process."""
    return _RATES.get()


def measured_again() -> DtypeRates:
    """Measure the rates now, and replace those in the file."""
    return _RATES.measured_again()
