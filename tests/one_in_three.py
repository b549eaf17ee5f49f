"""Of what takes long, a third has its turn at each commit (`seed` in /conftest.py); with PEFTCORE_FUZZ=all everything.

As a plugin of pytest, `-p one_in_three`, it takes a third of the tests.
"""

from __future__ import annotations

import hashlib
import os

import pytest
from fuzz import corpus


def has_its_turn(name: str, of: int = 3, at: int = 0) -> bool:
    """Whether it is the turn of `name`, one in `of`. Things of one name and another `at` never come together."""
    seed = os.environ.get("PEFTCORE_PORTABLE", "")
    return corpus.WHOLE or hashlib.sha256(f"{seed} {name}".encode()).digest()[0] % of == at


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = [item for item in items if has_its_turn(item.nodeid)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen
