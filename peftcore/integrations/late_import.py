"""Run a function when a module is imported, now or later."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

_awaited: set[str] = set()


def when_imported(name: str, act: Callable[[], Any]) -> None:
    """Call `act` once the module `name` has been imported: immediately if it already is. Once for each name."""
    if name in _awaited:
        return
    _awaited.add(name)
    if name in sys.modules:
        act()
    else:
        sys.meta_path.insert(0, _Finder(name, act))


class _Finder:
    """Finder on `sys.meta_path` that delegates to the others and calls `act` after the import."""

    def __init__(self, name: str, act: Callable[[], Any]) -> None:
        self.name, self.act = name, act

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        candidates = (finder.find_spec(name, path, target) for finder in others)
        spec: Any = next(filter(None, candidates), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.act()

        spec.loader.exec_module = exec_module
        return spec
