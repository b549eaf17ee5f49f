"""Measurements of this machine, taken once and kept in a JSON file in the user's cache folder."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "PEFTCORE_CPU_LEVEL")

T = TypeVar("T")


def cache_folder() -> Path:
    """Return the folder with the measurements of this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftcore"


def machine() -> str:
    """Return what measurements depend on: host, PyTorch release, number of threads, instruction sets in use."""
    parts = (platform.node(), platform.machine(), torch.__version__, torch.get_num_threads())
    return " ".join(map(str, (*parts, torch.backends.cpu.get_cpu_capability(), *settings(_LIMITS))))


def settings(names: tuple[str, ...]) -> list[str]:
    """Return `NAME=value` for each of these environment variables that is set."""
    return [f"{name}={os.environ[name]}" for name in names if os.environ.get(name)]


@dataclass(frozen=True)
class Measurement(Generic[T]):
    """A measurement that is taken once on a machine and read from a file afterwards.

    Args:
        name: File name in `cache_folder()`.
        read: Convert an entry of the file; raises KeyError, TypeError or ValueError if it has another format.
        measure: Take the measurement.
        to_json: Convert a measurement to what the file keeps.
        depends_on: Return what the measurement depends on besides `machine()`.
    """

    name: str
    read: Callable[[Any], T]
    measure: Callable[[], T]
    to_json: Callable[[T], Any]
    depends_on: Callable[[], str] = str

    def get(self) -> T:
        """Return the entry of this machine, or measure if the file has none."""
        try:
            return self.read(self._entries()[self._key()])
        except (KeyError, TypeError, ValueError):
            return self.measured_again()

    def measured_again(self) -> T:
        """Measure, and write the result to the file."""
        made, entries, folder = self.measure(), self._entries(), cache_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / self.name).write_text(json.dumps({**entries, self._key(): self.to_json(made)}, indent=1))
        except OSError:
            pass  # the next process measures again
        return made

    def _key(self) -> str:
        return f"{machine()} {self.depends_on()}".strip()

    def _entries(self) -> dict[str, Any]:
        try:
            entries = json.loads((cache_folder() / self.name).read_text())
        except (OSError, ValueError):
            return {}
        return entries if isinstance(entries, dict) else {}
