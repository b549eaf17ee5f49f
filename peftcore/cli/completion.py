"""What the shell offers at Tab: methods, adapters and runs. Nothing is imported for it that takes time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

_DEPTH = 3  # folders within folders that are looked through
_MOST = 2000  # folders that are looked at, at most: Tab must answer at once


def mentions(entry_point: EntryPoint, hook: str) -> bool:
    """May this plugin have the hook? Read off its source, without running it; where that fails, yes."""
    try:
        spec = find_spec(entry_point.module)
        return spec is None or spec.origin is None or hook in Path(spec.origin).read_text(encoding="utf-8")
    except Exception:  # whatever a broken plugin does; the registry reports it
        return True


def methods(incomplete: str) -> list[str]:
    """Installed methods that begin so: a method bears the name of its entry point."""
    found = {point.name for point in entry_points(group="peftcore") if mentions(point, "peftcore_methods")}
    return sorted(name for name in found if name.startswith(incomplete))


def adapters(incomplete: str) -> list[str]:
    """Folders of adapters, and of the runs that made them, that begin so. `NAME=FOLDER` completes the folder."""
    name, equals, path = incomplete.rpartition("=")
    folder, _, _ = path.rpartition("/")
    start = Path(folder or ("/" if path.startswith("/") else "."))
    found = (_as_typed(each, path) for each in _folders_of_adapters(start.expanduser()))
    return [f"{name}{equals}{each}" for each in sorted(found) if each.startswith(path)]


def _folders_of_adapters(start: Path) -> Iterator[Path]:
    """Those within `start`; of a run the run's own folder, in which every command finds the adapter."""
    level, seen = [start], 0
    for _ in range(_DEPTH):
        below: list[Path] = []
        for folder in level:
            try:
                with os.scandir(folder) as entries:
                    names = sorted(each.name for each in entries if not each.name.startswith(".") and each.is_dir())
            except OSError:  # of another user, or gone
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
    """The folder as the shell has to write it: with a home that was written `~`, and `./` where that was."""
    text = str(folder)
    if path.startswith("~/"):
        text = text.replace(str(Path.home()), "~", 1)
    return f"./{text}" if path.startswith("./") and not text.startswith("./") else text
