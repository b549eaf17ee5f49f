"""Shell completion of methods, adapters and runs, without slow imports."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from peftcore.plugin import method_names

_DEPTH = 3  # depth of folders searched
_MOST = 2000  # number of folders searched at most, so that Tab answers at once


def methods(incomplete: str) -> list[str]:
    """Return the installed methods with this prefix."""
    return [name for name in method_names() if name.startswith(incomplete)]


def adapters(incomplete: str) -> list[str]:
    """Return folders of adapters and runs with this prefix. `NAME=FOLDER` completes the folder."""
    name, equals, path = incomplete.rpartition("=")
    folder, _, _ = path.rpartition("/")
    start = Path(folder or ("/" if path.startswith("/") else "."))
    found = (_as_typed(each, path) for each in _folders_of_adapters(start.expanduser()))
    return [f"{name}{equals}{each}" for each in sorted(found) if each.startswith(path)]


def _folders_of_adapters(start: Path) -> Iterator[Path]:
    """Yield folders of adapters in `start`; for a run, the run's folder, in which every command finds the adapter."""
    level, seen = [start], 0
    for _ in range(_DEPTH):
        below: list[Path] = []
        for folder in level:
            try:
                with os.scandir(folder) as entries:
                    names = sorted(each.name for each in entries if not each.name.startswith(".") and each.is_dir())
            except OSError:  # another user's, or deleted
                continue
            for inside in (folder / name for name in names):
                seen += 1
                if seen > _MOST:
                    return
                if (inside / "adapter_config.json").exists() or (inside / "adapter" / "adapter_config.json").exists():
                    yield inside
                else:
                    below.append(inside)
        level = below


def _as_typed(folder: Path, path: str) -> str:
    """Return the folder as the shell has to write it: with `~` for home and `./` if they were typed."""
    text = str(folder)
    if path.startswith("~/"):
        text = text.replace(str(Path.home()), "~", 1)
    return f"./{text}" if path.startswith("./") and not text.startswith("./") else text
