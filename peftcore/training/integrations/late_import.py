"""Run a function when a module is imported, now or later.

A library imported after `apply` (`from transformers import Trainer`) would silently ignore adapters, but importing it
in `apply` would cost seconds even for users who never need it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_waiting: dict[str, list[Callable[[], object]]] = {}  # by module


def when_imported(name: str, act: Callable[[], object]) -> None:
    """Call `act` once the module `name` has been imported, or immediately if it already has.

    If `act` raises, the import raises too, and the next import calls `act` again.
    """
    if sys.modules.get(name) is not None:  # None: importing it is blocked
        act()
    elif name in _waiting:
        _waiting[name].append(act)
    else:
        _waiting[name] = [act]
        sys.meta_path.insert(0, _Finder(name))


class _Finder:
    """Finder on `sys.meta_path` that delegates to the other finders and runs callbacks after the import."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name:
            return None
        other_finders = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        candidates = (finder.find_spec(name, path, target) for finder in other_finders)
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
