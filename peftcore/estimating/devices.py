"""Devices and the time of a step on them: this machine, whose rates are measured once, and a table of cards.

    a card          sum over operators of max(operations / rate, bytes moved / bandwidth) + the cost of a call
    this machine    see `rates`

The rates of a card come from its data sheet (dense). A step is assumed to reach half of them in products and three
quarters of the bandwidth; neither was measured on a card. Memory is what a CUDA context leaves.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from peftcore.errors import PeftcoreError, nearest
from peftcore.estimating.calibration import here
from peftcore.estimating.following import Operation
from peftcore.estimating.measurements import Measurement
from peftcore.estimating.rates import Rates, measure, read
from peftcore.ops.build_info import build_info


class Sheet(NamedTuple):
    """Rates from a data sheet.

    Args:
        half, single: Floating-point operations per second in products of 16 and of 32 bits.
        bandwidth: Bytes per second.
        call: Seconds of a call besides its work.
    """

    half: float
    single: float
    bandwidth: float
    call: float

    def seconds(self, operation: Operation) -> float:
        """Return the seconds of one operation."""
        rate = self.half if operation.halves else self.single
        return operation.times * (max(operation.cost.flops / rate, operation.moved / self.bandwidth) + self.call)


@dataclass(frozen=True)
class Device:
    """Device that a step runs on.

    Args:
        memory: Bytes available to the step.
        rates: Rates from a data sheet, or as measured on this machine.
    """

    name: str
    memory: float
    rates: Sheet | Rates

    @property
    def measured(self) -> bool:
        """Whether the device is this machine, whose rates were measured."""
        return isinstance(self.rates, Rates)

    def seconds(self, operations: Sequence[Operation], fresh: int = 0) -> float:
        """Return the seconds of a step. `fresh`: bytes whose pages the system maps again in each step."""
        of_pages = fresh * self.rates.fresh if isinstance(self.rates, Rates) else 0.0
        return sum(map(self.rates.seconds, operations)) + of_pages


def usable(memory: float) -> float:
    """Return the bytes of a card's memory that its context and the driver leave."""
    return 0.94 * memory - 0.5e9


def libraries_of_command() -> float:
    """Return the bytes that Python and its libraries take in `peftcore train` on this machine."""
    return here(torch.get_num_threads()).libraries + _OF_COMMAND


def _card(name: str, gigabytes: float, half: float, single: float, bandwidth: float) -> Device:
    """Return a card from its data sheet: GB, TFLOP/s in 16 and 32 bits, GB/s."""
    return Device(name, usable(1e9 * gigabytes), Sheet(0.5e12 * half, 0.5e12 * single, 0.75e9 * bandwidth, 8e-6))


CARDS = {
    card.name: card
    for card in (
        _card("t4", 16, 65, 8.1, 320),
        _card("v100", 16, 112, 14, 900),
        _card("rtx3090", 24, 71, 35.6, 936),
        _card("rtx4090", 24, 165, 82.6, 1008),
        _card("rtx5090", 32, 209, 104.8, 1792),
        _card("l4", 24, 121, 30.3, 300),
        _card("l40s", 48, 362, 91.6, 864),
        _card("a100-40gb", 40, 312, 19.5, 1555),
        _card("a100", 80, 312, 19.5, 2039),
        _card("h100", 80, 989, 67, 3350),
        _card("h200", 141, 989, 67, 4800),
        _card("m3-max", 48, 28, 14, 400),
    )
}


def device_of(name: str) -> Device:
    """Return the card with this name, or this machine for `cpu`.

    Raises:
        PeftcoreError: The name is unknown.
    """
    if name == "cpu":
        return this_machine()
    card = CARDS.get(name.lower())
    if card is None:
        raise PeftcoreError(
            f"there is no card '{name}' in the table{nearest(name, [*CARDS, 'cpu'])}. "
            f"Use one of: cpu, {', '.join(CARDS)}"
        )
    return card


def memory_here() -> float:
    """Return the bytes of memory that are free on this machine, within the limit of a container.

    Raises:
        PeftcoreError: The system does not report free memory.
    """
    try:
        import psutil

        available = float(psutil.virtual_memory().available)
    except ImportError:
        try:
            available = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
        except (AttributeError, ValueError, OSError):
            raise PeftcoreError("free memory cannot be read here without psutil. Try: pip install psutil") from None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
        if limit != "max":
            available = min(available, float(limit) - float(used))
    except (OSError, ValueError):  # the system has no such limit
        pass
    return available


def _kernels() -> str:
    """Return the kernels in use, since another build is measured again."""
    build = build_info()
    return f"{build.cpu_level} {build.commit}".strip()


_OF_COMMAND = 0.1e9  # bytes of what `peftcore train` imports besides transformers' Trainer
_RATES = Measurement("rates.json", read, measure, Rates._asdict, _kernels)


def this_machine() -> Device:
    """Return this machine, with rates that are measured at the first call and kept in a file."""
    return Device("this machine", memory_here(), _RATES.get())
