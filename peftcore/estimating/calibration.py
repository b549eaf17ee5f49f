"""Measurement of this machine's `overhead`, once, by a process of its own whose memory holds nothing else.

The process trains a small transformer and compares its peak with that of the tensors. Linux only: the peak comes from
/proc/self/status.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.estimating.following import Following
from peftcore.estimating.measurements import Measurement, settings
from peftcore.estimating.overhead import LARGEST_SEEN, NONE, OUTER, PLAIN, TRANSPOSED, Overhead, read
from peftcore.estimating.peaks import peaks

_TIMEOUT = 300  # seconds
_ALLOCATOR = ("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
_DTYPES = (torch.bfloat16, torch.float16)
_SHAPES = 6  # products of other shapes, for the code that each of them keeps
_HIDDEN, _LAYERS, _HEADS, _BATCH, _LENGTH, _STEPS = 256, 4, 8, 8, 96, 3


@functools.cache
def here(threads: int) -> Overhead:
    """Return the overhead on this machine with so many threads, or the largest one seen where it cannot be measured."""
    try:
        return _OVERHEAD.get()
    except (OSError, ValueError, KeyError, TypeError, IndexError, subprocess.SubprocessError):
        return LARGEST_SEEN


def _measure_in_process() -> Overhead:
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": path}
    command = [sys.executable, "-c", f"from {__name__} import main; main()"]
    ran = subprocess.run(command, capture_output=True, timeout=_TIMEOUT, env=environment, check=True)
    return read(json.loads(ran.stdout.splitlines()[-1]))


_OVERHEAD = Measurement(
    "overhead.json", read, _measure_in_process, Overhead._asdict, lambda: " ".join(settings(_ALLOCATOR))
)


def main() -> None:
    """Measure in this process, and print the overhead as JSON."""
    print(json.dumps(measure()._asdict()))


def measure() -> Overhead:
    """Measure in this process, which must be new.

    Raises:
        OSError: The system does not report resident memory.
    """
    with suppress(ImportError, RuntimeError):  # transformers raises both for what is missing or broken
        import transformers.trainer  # noqa: F401
    imported = _status("VmRSS")
    _train(_Transformer(64, 1), torch.ones(1, 8, 64))
    _product(TRANSPOSED, 512, 256, 16384, torch.float32)()
    scratch, code = {}, {}
    for dtype in _DTYPES:
        name = str(dtype).removeprefix("torch.")
        code[name] = _kept([_product(TRANSPOSED, 64 + 16 * i, 64, 128, dtype) for i in range(_SHAPES)]) // _SHAPES
        for layout in (PLAIN, TRANSPOSED, OUTER):
            taken = _scratch(_product(layout, 1024, 64, 1024, dtype)) / 1024**2
            scratch[f"{name} {layout}"] = round(taken) if taken >= 1 else 0.0
    _trim()
    libraries = _status("VmRSS")
    return Overhead(libraries, libraries - imported, code, scratch, _allowance())


def _allowance() -> float:
    """Return the share by which the heap outgrows the tensors that come and go in a small transformer's step."""
    with torch.device("meta"):
        stand_in, rows = _Transformer(_HIDDEN, _LAYERS), torch.empty(_BATCH, _LENGTH, _HIDDEN)
    following = Following(NONE)
    for tensor in (*stand_in.parameters(), rows):
        following.see(tensor)
    with following.running(stand_in):
        _train(stand_in, rows)
    following.end()
    found = peaks(following.storages, following.operations)
    model, values = _Transformer(_HIDDEN, _LAYERS), torch.ones(_BATCH, _LENGTH, _HIDDEN)
    _trim()
    before = _status("VmRSS") - sum(t.nbytes for t in (*model.parameters(), values))

    def train() -> None:
        for _ in range(_STEPS):
            _train(model, values)

    most = _peak(train)
    return max(0.0, (most - before - found.large - found.small) / found.passing)


class _Transformer(nn.Module):
    """Blocks whose biases and norms are trained."""

    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(_Block(hidden) for _ in range(layers)))
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).square().mean()


class _Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(2))
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        heads = [t.view(batch, length, _HEADS, -1).transpose(1, 2) for t in self.qkv(self.norms[0](x)).chunk(3, -1)]
        x = x + self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(batch, length, hidden))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


def _train(model: _Transformer, rows: Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-6, foreach=False)
    model(rows).backward()
    optimizer.step()
    optimizer.zero_grad()


def _product(layout: str, rows: int, inner: int, columns: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    x = torch.ones((inner, rows) if layout == OUTER else (rows, inner), dtype=dtype)
    w = torch.ones((columns, inner) if layout == TRANSPOSED else (inner, columns), dtype=dtype)
    return lambda: (x.t() if layout == OUTER else x) @ (w.t() if layout == TRANSPOSED else w)


def _kept(calls: list[Callable[[], Tensor]]) -> int:
    """Return the bytes that are resident after the calls and were not before."""
    _trim()
    before = _status("RssAnon")
    for call in calls:
        call()
    _trim()
    return max(0, _status("RssAnon") - before)


def _scratch(call: Callable[[], Tensor]) -> int:
    """Return the bytes that a call takes at its peak besides its result."""
    call()  # allocates what is kept
    _trim()  # or the call would use free memory of the heap
    before = _status("VmRSS")
    made: list[Tensor] = []
    most = _peak(lambda: made.append(call()))
    return max(0, most - before - made[0].nbytes)


def _peak(call: Callable[[], object]) -> int:
    """Return the most bytes that are resident during the call."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    call()
    return _status("VmHWM")


def _trim() -> None:
    gc.collect()
    with suppress(AttributeError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
