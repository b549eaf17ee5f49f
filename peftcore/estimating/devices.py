"""What a step's operations take in seconds: on this machine, whose rates are measured once, and on named cards.

    a card    sum over operators of max(operations / rate, bytes moved / bandwidth) + what a call costs
    here      see `rates`

Rates of cards are their makers' (dense, without sparsity), of which a step reaches about half in products and three
quarters in bandwidth; memory is what is left of it beside a context. Nothing here was measured on them.
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
    """Rates of a data sheet.

    Args:
        half, single: floating-point operations a second in products of 16 and of 32 bits.
        bandwidth: bytes a second.
        call: seconds that an operator costs beside its work.
    """

    half: float
    single: float
    bandwidth: float
    call: float

    def seconds(self, operation: Operation) -> float:
        """Of one operator."""
        rate = self.half if operation.halves else self.single
        return operation.times * (max(operation.cost.flops / rate, operation.moved / self.bandwidth) + self.call)


@dataclass(frozen=True)
class Device:
    """Where a step runs.

    Args:
        memory: bytes that there are for tensors.
        rates: of a data sheet, or as they were measured on this machine.
    """

    name: str
    memory: float
    rates: Sheet | Rates

    @property
    def measured(self) -> bool:
        """Is it this machine?"""
        return isinstance(self.rates, Rates)

    def seconds(self, operations: Sequence[Operation], fresh: int = 0) -> float:
        """Of a step of these operations. `fresh`: bytes of memory that a process of this machine gets anew in it."""
        of_pages = fresh * self.rates.fresh if isinstance(self.rates, Rates) else 0.0
        return sum(map(self.rates.seconds, operations)) + of_pages


def usable(memory: float) -> float:
    """Bytes of a card's memory that there are for tensors, beside a context and what is not to be had."""
    return 0.94 * memory - 0.5e9


def libraries_of_command() -> float:
    """Return the bytes that Python and its libraries take in `peftcore train` on this machine."""
    return here(torch.get_num_threads()).libraries + _OF_COMMAND


def _card(name: str, gigabytes: float, half: float, single: float, bandwidth: float) -> Device:
    """Of its data sheet: GB, TFLOP/s in 16 and 32 bits, GB/s."""
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
    """The card of that name, or with `cpu` this machine.

    Raises:
        PeftcoreError: it is neither.
    """
    if name == "cpu":
        return this_machine()
    card = CARDS.get(name.lower())
    if card is None:
        raise PeftcoreError(
            f"there is no card '{name}' in the table{nearest(name, [*CARDS, 'cpu'])}. It has: cpu, {', '.join(CARDS)}"
        )
    return card


def memory_here() -> float:
    """Bytes of this machine's memory that may be had now, within a container's limit.

    Raises:
        PeftcoreError: that cannot be told here.
    """
    try:
        import psutil

        available = float(psutil.virtual_memory().available)
    except ImportError:
        try:
            available = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
        except (AttributeError, ValueError, OSError):
            raise PeftcoreError("how much memory is free is asked of psutil here: pip install psutil") from None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
        if limit != "max":
            available = min(available, float(limit) - float(used))
    except (OSError, ValueError):  # no such limit here
        pass
    return available


def _kernels() -> str:
    """Which kernels run: a build that multiplies faster is measured again."""
    build = build_info()
    return f"{build.cpu_level} {build.commit}".strip()


_OF_COMMAND = 0.1e9  # bytes of what `peftcore train` imports besides transformers' Trainer
_RATES = Measurement("rates.json", read, measure, Rates._asdict, _kernels)


def this_machine() -> Device:
    """This machine, with its rates as they were measured when that was first asked; kept in a file of the user's."""
    return Device("this machine", memory_here(), _RATES.get())
