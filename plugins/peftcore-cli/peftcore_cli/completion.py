"""Shell completion of methods, adapters and runs, without slow imports."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from peftcore.plugin import method_names

_DEPTH = 3  # depth of folders searched
_MAX_FOLDERS = 2000  # maximum number of folders searched, so that completion is instant


def methods(incomplete: str) -> list[str]:
    """Return the installed methods with this prefix."""
    return [name for name in method_names() if name.startswith(incomplete)]


def adapters(incomplete: str) -> list[str]:
    """Return folders of adapters and runs with this prefix. `NAME=FOLDER` completes the folder."""
    name, equals, path = incomplete.rpartition("=")
    folder, _, _ = path.rpartition("/")
    start = Path(folder or ("/" if path.startswith("/") else "."))
    candidates = (_as_typed(folder_text, path) for folder_text in _folders_of_adapters(start.expanduser()))
    return [f"{name}{equals}{folder_text}" for folder_text in sorted(candidates) if folder_text.startswith(path)]


def _folders_of_adapters(start: Path) -> Iterator[Path]:
    """Yield folders of adapters below `start`; for the adapter of a run, the run's folder, which commands accept."""
    level, folder_count = [start], 0
    for _ in range(_DEPTH):
        next_level: list[Path] = []
        for folder in level:
            try:
                with os.scandir(folder) as entries:
                    names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
            except OSError:  # the folder was deleted, or belongs to another user
                continue
            for child in (folder / name for name in names):
                folder_count += 1
                if folder_count > _MAX_FOLDERS:
                    return
                if (child / "adapter_config.json").exists() or (child / "adapter" / "adapter_config.json").exists():
                    yield child
                else:
                    next_level.append(child)
        level = next_level


def _as_typed(folder: Path, path: str) -> str:
    """Return the folder with the prefix that the user typed (`~/` or `./`), because the shell compares it literally."""
    text = str(folder)
    if path.startswith("~/"):
        text = text.replace(str(Path.home()), "~", 1)
    return f"./{text}" if path.startswith("./") and not text.startswith("./") else text
