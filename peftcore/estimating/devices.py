"""Devices for which a step is predicted: this machine, and a table of GPUs with their memory."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from peftcore.errors import PeftcoreError, nearest


@dataclass(frozen=True)
class Device:
    """Device on which a step runs.

    Args:
        memory: Bytes available to the step.
        is_card: Whether the device is a GPU from the table, not this machine.
    """

    name: str
    memory: float
    is_card: bool = False


def usable(memory: float) -> float:
    """Return the bytes of a GPU's memory that are left beside its context and the driver."""
    return 0.94 * memory - 0.5e9


_GIGABYTES = {
    "t4": 16, "v100": 16, "rtx3090": 24, "rtx4060": 8, "rtx4070": 12, "rtx4090": 24, "rtx5090": 32, "l4": 24,
    "l40s": 48, "a100-40gb": 40, "a100": 80, "h100": 80, "h200": 141, "m3-max": 48,
}  # fmt: skip
CARDS = {name: Device(name, usable(1e9 * size), is_card=True) for name, size in _GIGABYTES.items()}


def device_of(name: str) -> Device:
    """Return the GPU with this name, or this machine for `cpu`.

    Raises:
        PeftcoreError: The name is unknown.
    """
    if name == "cpu":
        return Device("this machine", memory_here())
    card = CARDS.get(name.lower())
    if card is None:
        raise PeftcoreError(
            f"unknown device '{name}'{nearest(name, [*CARDS, 'cpu'])}. Use one of: cpu, {', '.join(CARDS)}"
        )
    return card


def memory_here() -> float:
    """Return the free memory of this machine in bytes, within the limit of a container.

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
            raise PeftcoreError(
                "the machine's free memory cannot be read without psutil. Install it: pip install psutil"
            ) from None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        usage = Path("/sys/fs/cgroup/memory.current").read_text().strip()
        if limit != "max":
            available = min(available, float(limit) - float(usage))
    except (OSError, ValueError):  # the system does not have such a limit
        pass
    return available


def process_memory() -> int:
    """Return this process's resident memory in bytes.

    Raises:
        PeftcoreError: The system does not report resident memory.
    """
    if sys.platform == "linux":
        return os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[1])
    try:
        import psutil
    except ImportError:
        raise PeftcoreError(
            "this process's memory cannot be read without psutil. Install it: pip install psutil"
        ) from None
    return int(psutil.Process().memory_info().rss)
