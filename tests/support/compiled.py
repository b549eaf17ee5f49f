"""Binaries that tests compile from C++ sources, kept in build/ until one of the files that went into them changes."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OBJECTS = ROOT / "build" / "tests"


@cache
def _included(path: Path, folders: tuple[Path, ...]) -> frozenset[Path]:
    """Return the file and those that it includes by `#include "..."`, found next to it or in `folders`."""
    found = {path}
    for name in re.findall(r'^\s*#\s*include\s+["<]([^">]+)[">]', path.read_text(), re.M):
        for folder in (path.parent, *folders):
            if (folder / name).is_file():
                found |= _included(folder / name, folders)
                break
    return frozenset(found)


def _digest(source: Path, command: Sequence[str]) -> str:
    """Return a digest of the command, the source and the files of this repository that it includes."""
    folders = tuple(Path(flag[2:]) for flag in command if flag.startswith("-I"))
    found = hashlib.sha256("\0".join(command).encode())
    for path in sorted(_included(source, folders)):
        found.update(f"{path} ".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def _run(target: Path, command: Sequence[str]) -> Path:
    """Run a compiler that writes `target`, unless it exists. An interrupted run leaves no file with that name.

    Workers that need the same target wait for the one that compiles it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            partial = target.with_name(f"{target.name}.{os.getpid()}")
            done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            partial.rename(target)
    return target


def precompiled(header: Path, compiler: str, flags: Sequence[str]) -> Path:
    """Return a header that includes `header` and is precompiled, for `-include`, by g++, with the same flags."""
    command = [compiler, *flags, "-x", "c++-header"]
    own = OBJECTS / f"{header.stem}-{_digest(header, command)}.h"
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text(f'#include "{header}"\n')
    _run(own.with_name(f"{own.name}.gch"), [*command, str(own)])
    return own


def unit(name: str, text: str) -> Path:
    """Return the path of a C++ file with this text, written only where the text differs."""
    OBJECTS.mkdir(parents=True, exist_ok=True)
    path = OBJECTS / f"{name}.cpp"
    if not path.exists() or path.read_text() != text:
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(text)
        partial.rename(path)
    return path


def compiled(
    name: str,
    sources: Iterable[Path],
    compiler: str,
    flags: Sequence[str],
    link: Sequence[str] = (),
    flags_of: Callable[[Path], Sequence[str]] = lambda source: (),
) -> Path:
    """Return the path of a binary that is compiled, two files at a time, from `sources`.

    Args:
        name: prefix of the file's name.
        sources: C++ files; .cu files are compiled as C++.
        compiler: command of the compiler.
        flags: flags of the compiler and the linker.
        link: further flags of the linker.
        flags_of: further flags for a source.
    """

    def compile_one(source: Path) -> Path:
        command = [compiler, *flags, *flags_of(source), "-x", "c++", "-c", str(source)]
        return _run(OBJECTS / f"{source.stem}-{_digest(source, command)}.o", command)

    _included.cache_clear()
    with ThreadPoolExecutor(2) as pool:
        objects = [str(path) for path in pool.map(compile_one, sources)]
    command = [compiler, *flags, *objects, *link]
    return _run(OBJECTS / f"{name}-{hashlib.sha256(' '.join(command).encode()).hexdigest()[:16]}", command)
