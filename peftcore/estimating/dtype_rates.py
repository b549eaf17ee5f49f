"""Rates at which PyTorch multiplies fp32, bf16 and fp16 on this CPU: in which dtype a model computes fast here.

    forward     x Wᵀ        of 256 x 256 x 256
    backward    dy W        the other layout, for which a CPU without instructions for a dtype may take another loop
    share       both products' time in fp32 / theirs in the dtype

A CPU without bf16 instructions multiplies bf16 20 to 60 times slower than fp32. Measured in less than two seconds, and
kept in the file of this machine, so that two commands choose alike. One thread is measured: where other programs keep a
core busy, threads wait for each other, and every dtype seems equally slow.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftcore.estimating.measurements import Measurement

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FAST = 0.5  # of fp32's rate, from which on a dtype of half the memory is worth it
_SIZE = 256
_SECONDS, _SLOW = 0.6, 0.1  # of all rounds; a product that takes longer than this is measured once


class DtypeRate(NamedTuple):
    """Floating-point operations a second in one dtype, of x Wᵀ (`forward`) and of dy W (`backward`)."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        """Operations a second of one product of each kind."""
        return 2 / (1 / self.forward + 1 / self.backward)


class DtypeRates(NamedTuple):
    """Rates of one thread of this machine."""

    fp32: DtypeRate
    bf16: DtypeRate
    fp16: DtypeRate

    def of(self, dtype: str) -> DtypeRate:
        """The rate of a dtype that is named as in `DTYPES`."""
        return self[tuple(DTYPES).index(dtype)]

    def share(self, dtype: str) -> float:
        """Return the dtype's rate as a share of fp32's."""
        return self.of(dtype).both / self.fp32.both

    def is_fast(self, dtype: str) -> bool:
        """Return whether the dtype is multiplied at half of fp32's rate at least."""
        return self.share(dtype) >= FAST

    def sentence(self, dtype: str) -> str:
        """Compare the dtype with fp32: `at 0.02 of fp32's rate on this processor (1.2 of 53 GFLOP/s per core)`."""
        own, wide = (gigaflops(self.of(name).both) for name in (dtype, "fp32"))
        return f"at {self.share(dtype):.2g} of fp32's rate on this processor ({own} of {wide} GFLOP/s per core)"


def gigaflops(rate: float) -> str:
    """Write a rate in GFLOP/s, with two digits at least."""
    return f"{rate / 1e9:,.0f}" if rate >= 10e9 else f"{rate / 1e9:.2g}"


def measure(clock: Callable[[], float] = time.perf_counter) -> DtypeRates:
    """Measure all rates: the shortest of several rounds, in which each product has its turn."""
    calls: dict[tuple[str, str], Callable[[], Tensor]] = {}
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad(), _one_thread():
        torch.manual_seed(0)
        wide = torch.randn(2, _SIZE, _SIZE)
        for name, dtype in DTYPES.items():
            x, w = wide.to(dtype)
            calls[name, "forward"] = functools.partial(torch.mm, x, w.t())
            calls[name, "backward"] = functools.partial(torch.mm, x, w)
        shortest = {each: _seconds(call, clock) for each, call in calls.items()}  # with what libraries prepare
        end, again = clock() + _SECONDS, [each for each, taken in shortest.items() if taken < _SLOW]
        for number in range(40):
            if number >= 2 and clock() >= end:
                break
            for each in again:
                shortest[each] = min(shortest[each], _seconds(calls[each], clock))
    flops = 2 * _SIZE**3
    return DtypeRates(*(DtypeRate(flops / shortest[d, "forward"], flops / shortest[d, "backward"]) for d in DTYPES))


@contextmanager
def _one_thread() -> Iterator[None]:
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
    """Read what JSON keeps of them.

    Raises:
        KeyError, TypeError, ValueError: the entry is of another kind.
    """
    rates = DtypeRates(**{name: DtypeRate(*map(float, found[name])) for name in DTYPES})
    if not all(0 < each < float("inf") for rate in rates for each in rate):
        raise ValueError("rates must be positive")
    return rates


_RATES = Measurement("dtypes.json", read, measure, DtypeRates._asdict)


@functools.cache
def here() -> DtypeRates:
    """Return this machine's rates: from its file, else measured, once a process."""
    return _RATES.get()


def measured_again() -> DtypeRates:
    """Measure the rates now, and keep them in place of those in the file."""
    return _RATES.measured_again()
