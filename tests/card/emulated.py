"""The emulator's build of the operators, loaded into this process: operators on CPU tensors run CUDA's kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from emulator import building

from card.table import Skip


@cache
def library() -> ctypes.CDLL:
    """Load the library, whose registrations replace those of the CPU, once."""
    from peftcore.ops.optim_rules import describe  # defines the operators, and registers the CPU's kernels first

    cxx = building.compiler()
    if cxx is None:
        raise Skip("no g++, which compiles the emulator's build")
    found = ctypes.CDLL(str(building.library_of_operators(cxx)))

    def define_rule(name: str, planes: list[tuple[str, int]], scalars: str) -> None:
        table = (ctypes.c_int64 * 2 * len(planes))(*((dtype == "uint8", elements) for dtype, elements in planes))
        found.emulator_define_rule(name.encode(), table, len(planes), scalars.encode())

    describe(define_rule)
    return found


@contextmanager
def capturing() -> Iterator[None]:
    """Let the runtime say that a CUDA graph is captured."""
    flag = ctypes.c_int.in_dll(library(), "emulator_capturing")
    flag.value = 1
    try:
        yield
    finally:
        flag.value = 0
