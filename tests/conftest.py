"""Fixtures of all tests: the toy methods, installed, and plugins that are found."""

import os
import sys
import types
from collections.abc import Callable, Iterator

import pytest
import torch
from support.entry_points import entry
from support.toys import toys

from peftcore.plugin import discovery as plugin_discovery
from peftcore.plugin.registry import Registry

__all__ = ["toys"]

# Without a GPU, Triton's interpreter runs kernels (tests/ops/triton). Triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def switching_often() -> Iterator[None]:
    """Threads take turns every 0.1 ms, for one test."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def discover(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Registry]:
    """A registry that finds the plugin objects given as {entry point: (object, distribution)}."""

    def discover(*entries: tuple[str, object, str]) -> Registry:
        entry_points = []
        for index, (name, plugin, distribution) in enumerate(entries):
            if plugin is not None and not hasattr(plugin, "peftcore_api"):
                plugin.peftcore_api = ">=3.0,<4"
            module = types.ModuleType(f"plugin_{index}")
            module.plugin = plugin
            monkeypatch.setitem(sys.modules, module.__name__, module)
            attribute = "plugin" if plugin is not None else "missing"
            entry_points.append(entry(name, f"{module.__name__}:{attribute}", distribution))
        monkeypatch.setattr(plugin_discovery, "entry_points", lambda group: entry_points)
        return Registry()

    return discover
