"""What PyTorch's libraries take of memory inside products on this machine, measured once and kept in a file.

Which library computes a product, and how, depends on the processor: MKL keeps packed fp32 panels for good, the larger
the more columns; oneDNN keeps code for each of the last 1,024 shapes, and may go through fp32 for 16 bits; without
either, products of transposed 16-bit matrices take 4 bytes for each result. So they are asked: a process of its own
runs small products and looks at what it has before, at most and after. Where that can't be done (not Linux, not glibc),
the most that was seen on any machine is taken.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

PLAIN, TRANSPOSED, OUTER = "xw", "xwt", "xtw"  # products x w, x wᵀ and xᵀ w
COLUMNS = (64, 256, 1024, 4096, 16384)
_SEVERAL = 6  # shapes, of which each takes the same
_TIMEOUT = 120  # seconds
_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "PEFTCORE_CPU_LEVEL")

T = TypeVar("T")


class Libraries(NamedTuple):
    """Bytes.

    Args:
        panels: (columns, allocated, touched) that are kept after products in fp32 of so many columns.
        code: (allocated, touched) that are kept for each shape of a product, by its dtype.
        scratch: for each result of a product, while it is computed, by its dtype and layout.
    """

    panels: tuple[tuple[int, int, int], ...]
    code: dict[str, tuple[int, int]]
    scratch: dict[str, float]

    def of_columns(self, columns: int) -> tuple[int, int]:
        """(allocated, touched) after products in fp32 with so many columns at most."""
        return next((each[1:] for each in self.panels if each[0] >= columns), self.panels[-1][1:])


# Seen: MKL on Cascade Lake; oneDNN on Zen 4 with bf16, and on Cascade Lake, which has none.
MOST_SEEN = Libraries(
    tuple((c, 4_600_000 + 1640 * min(c, 9000), 700_000 + 1640 * min(c, 9000)) for c in COLUMNS),
    {"bfloat16": (600_000, 300_000), "float16": (40_000, 40_000)},
    {f"{dtype} {layout}": 4.0 for dtype in ("bfloat16", "float16") for layout in (PLAIN, TRANSPOSED, OUTER)},
)
OF_A_CARD = Libraries(((COLUMNS[-1], 0, 0),), {}, {})


def cache_folder() -> Path:
    """Where what was measured of this machine is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftcore"


def machine() -> str:
    """What measurements depend on: the machine, PyTorch, its threads, and the instructions that it may use."""
    limits = [f"{name}={os.environ[name]}" for name in _LIMITS if os.environ.get(name)]
    parts = (platform.node(), platform.machine(), torch.__version__, torch.get_num_threads())
    return " ".join(map(str, (*parts, torch.backends.cpu.get_cpu_capability(), *limits)))


@dataclass(frozen=True)
class FromFile(Generic[T]):
    """What is measured once on a machine, and kept in a file of the user's.

    Args:
        name: of the file, in `cache_folder()`.
        read: makes it of what JSON has; raises KeyError, TypeError or ValueError where that is of another kind.
        measure: takes the measurement.
        to_json: makes of it what JSON keeps.
        kernels: says with which kernels of peftcore's it is measured; by default none take part.
    """

    name: str
    read: Callable[[Any], T]
    measure: Callable[[], T]
    to_json: Callable[[T], Any]
    kernels: Callable[[], str] = str

    def found(self) -> T:
        """Return what the file has for this machine; where it has nothing, measure."""
        try:
            return self.read(self._kept()[self._key()])
        except (KeyError, TypeError, ValueError):
            return self.measured()

    def measured(self) -> T:
        """Measure, and put the result into the file."""
        made, kept, folder = self.measure(), self._kept(), cache_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / self.name).write_text(json.dumps({**kept, self._key(): self.to_json(made)}, indent=1))
        except OSError:
            pass  # it is measured again the next time
        return made

    def _key(self) -> str:
        return f"{machine()} {self.kernels()}".strip()

    def _kept(self) -> dict[str, Any]:
        try:
            kept = json.loads((cache_folder() / self.name).read_text())
        except (OSError, ValueError):
            return {}
        return kept if isinstance(kept, dict) else {}


def here() -> Libraries:
    """Of this machine, with so many threads as PyTorch has now."""
    return read_or_measured(machine(), cache_folder() / "libraries.json")


@functools.cache
def read_or_measured(key: str, file: Path) -> Libraries:
    """What the file has for that machine; where it has nothing, what is measured, which goes into it."""
    kept = {}
    try:
        kept = json.loads(file.read_text())
        return _read(kept[key])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    try:
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        ran = subprocess.run(
            [sys.executable, str(Path(__file__))], capture_output=True, timeout=_TIMEOUT, env=environment, check=True
        )
        found = json.loads(ran.stdout)
        measured = _read(found)
    except (OSError, ValueError, KeyError, TypeError, subprocess.SubprocessError):
        return MOST_SEEN
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**kept, key: found}, indent=1))
    except OSError:
        pass  # they are measured again the next time
    return measured


def _read(found: dict[str, object]) -> Libraries:
    made = Libraries(**found)  # type: ignore[arg-type]  # checked below
    panels = tuple((int(c), int(a), int(t)) for c, a, t in made.panels)
    code = {name: (int(a), int(t)) for name, (a, t) in made.code.items()}
    if not panels:
        raise ValueError("no panels")
    return Libraries(panels, code, {name: float(each) for name, each in made.scratch.items()})


class _MallInfo(ctypes.Structure):
    """What glibc's `mallinfo2` returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ord", "smb", "hblks", "hblkhd", "usmb", "fsmb", "uord", "ford", "keep")
    ]


def _allocated() -> int:
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _MallInfo
    info = libc.mallinfo2()
    return int(info.uord + info.hblkhd)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def _kept(call: Callable[[], object]) -> tuple[int, int]:
    """(allocated, touched) bytes that are there after a call, and were not before."""
    trim = ctypes.CDLL(None).malloc_trim
    gc.collect()
    trim(0)
    allocated, touched = _allocated(), _status("RssAnon")
    call()
    gc.collect()
    trim(0)
    return max(0, _allocated() - allocated), max(0, _status("RssAnon") - touched)


def _scratch(call: Callable[[], Tensor]) -> int:
    """Bytes that a call has at most beside its result."""
    call()  # what it keeps
    ctypes.CDLL(None).malloc_trim(0)  # or it would be of what lies free
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmHWM")
    made = call()
    return max(0, _status("VmHWM") - before - made.nbytes)


def _product(layout: str, rows: int, inner: int, columns: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    x = torch.ones((inner, rows) if layout == OUTER else (rows, inner), dtype=dtype)
    w = torch.ones((columns, inner) if layout == TRANSPOSED else (inner, columns), dtype=dtype)
    return lambda: (x.t() if layout == OUTER else x) @ (w.t() if layout == TRANSPOSED else w)


def measure() -> Libraries:
    """Run the products and look; in a process that has not multiplied before, on Linux with glibc.

    Raises:
        OSError, AttributeError: it cannot be looked at here.
    """
    panels, allocated, touched = [], 0, 0
    _product(PLAIN, 2, 2, 2, torch.float32)()
    for columns in COLUMNS:
        more, of_it = _kept(_product(TRANSPOSED, 512, 256, columns, torch.float32))
        allocated, touched = allocated + more, touched + of_it
        panels.append((columns, allocated, touched))
    code, scratch = {}, {}
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        _product(TRANSPOSED, 64, 64, 64, dtype)()
        made = [_product(TRANSPOSED, 64 + 16 * i, 64, 128, dtype) for i in range(_SEVERAL)]
        found = _kept(lambda: [call() for call in made])  # noqa: B023  # called at once
        code[name] = found[0] // _SEVERAL, found[1] // _SEVERAL
        for layout in (PLAIN, TRANSPOSED, OUTER):
            taken = _scratch(_product(layout, 1024, 64, 1024, dtype)) / 1024**2
            scratch[f"{name} {layout}"] = round(taken) if taken >= 1 else 0.0
    return Libraries(tuple(panels), code, scratch)


if __name__ == "__main__":
    print(json.dumps(measure()._asdict()))
