"""SIMD levels of the CPU kernels, for tests that run at each of them."""

from collections.abc import Iterator
from contextlib import contextmanager

from peftcore import ops

LEVELS_OF = {  # each kind of processor, lowest first: a level has what the levels before it have (csrc/cpu/levels.cpp)
    "x86-64": ("portable", "avx2", "avx512", "avx512bf16", "amx"),
    "64-bit ARM": ("portable", "neon", "neonbf16"),
}
LEVELS = ops.extension.cpu_levels() if ops.extension is not None else ["reference"]


@contextmanager
def at_level(name: str) -> Iterator[str]:
    """All kernels at this level."""
    if ops.extension is None:
        yield name
        return
    before = ops.extension.cpu_level()
    ops.extension.set_cpu_level(name)
    try:
        yield name
    finally:
        ops.extension.set_cpu_level(before)
