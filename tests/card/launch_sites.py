"""Kernels of csrc, where they are launched, and which of them a run of the emulator's build reached."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parents[2] / "csrc"
LAUNCH = re.compile(r"PEFTCORE_LAUNCH(?:_CLUSTERS)?\s*\(\s*\(?\s*(?:\w+::)*(\w+)")


class Kernel(NamedTuple):
    """A `__global__` function, by its file below csrc."""

    file: str
    name: str


class Site(NamedTuple):
    """A place that launches a kernel."""

    file: str
    line: int
    kernel: str


@cache
def kernels() -> tuple[Kernel, ...]:
    """Return all kernels of csrc that operators launch."""
    found = []
    for path in sources():
        text = re.sub(r"//.*", "", path.read_text())
        for name in re.findall(r"__global__[^;{]*?\b(\w+)\s*\((?![^()]*\)\s*\w+\s*\()", text):
            if name not in ("__launch_bounds__", "nothing"):  # `nothing` asks whether the card has code
                found.append(Kernel(path.relative_to(CSRC).as_posix(), name))
    return tuple(found)


def sources() -> list[Path]:
    return sorted([*CSRC.glob("**/*.cu"), *CSRC.glob("**/*.cuh")])


@cache
def sites(file: str) -> tuple[Site, ...]:
    """Return the launches of a file below csrc; `kernel` as a name stands for the variable's value."""
    lines = (CSRC / file).read_text().splitlines()
    found = []
    for number, line in enumerate(lines):
        match = LAUNCH.search(line)
        if match is None or line.lstrip().startswith(("#", "//")):
            continue
        name = match[1]
        if name not in {kernel.name for kernel in kernels()}:
            before = "\n".join(lines[:number])
            assigned = re.findall(rf"\b{name}\s*=\s*(\w+)", before)
            name = assigned[-1] if assigned else name
        found.append(Site(file, number + 1, name))
    return tuple(found)


def reached(places: list[str]) -> set[Kernel]:
    """Return the kernels launched from places such as "/path/csrc/lora/cuda/up.cu:132 const char* launch(...)"."""
    found = set()
    for place in places:
        match = re.match(r"(.+?):(\d+) ", place)
        if match is None or "/csrc/" not in match[1]:
            continue
        file, line = match[1].rpartition("/csrc/")[2], int(match[2])
        before = [site for site in sites(file) if site.line <= line]
        if not before:
            raise AssertionError(f"{file}:{line} launches a kernel by another macro than PEFTCORE_LAUNCH")
        found.add(Kernel(file, before[-1].kernel))
    return found
