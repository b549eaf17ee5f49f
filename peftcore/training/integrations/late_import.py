"""Run a function when a module is imported, now or later.

A library may be imported after `apply` (`from transformers import Trainer`), and would then ignore adapters without an
error; importing it in `apply` would cost those who never use it seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_waiting: dict[str, list[Callable[[], object]]] = {}  # by module


def when_imported(name: str, act: Callable[[], object]) -> None:
    """Call `act` once the module `name` has been imported: immediately if it already is.

    If `act` raises, so does the import, and the next import calls it again.
    """
    if sys.modules.get(name) is not None:  # None: its import is blocked
        act()
    elif name in _waiting:
        _waiting[name].append(act)
    else:
        _waiting[name] = [act]
        sys.meta_path.insert(0, _Finder(name))


class _Finder:
    """Finder on `sys.meta_path` that delegates to the others and calls what waits after the import."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        candidates = (finder.find_spec(name, path, target) for finder in others)
        spec = next(filter(None, candidates), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            acts = _waiting.get(name, [])
            while acts:
                acts[0]()
                del acts[0]
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                del _waiting[name]

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
