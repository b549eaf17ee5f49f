from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from peftcore.engine import lazy_tensor


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How often logits have been computed."""
    count, original = [0], lazy_tensor.Recipe._computed

    def counted(self: Any) -> Tensor:
        count[0] += self.parent is None
        return original(self)

    monkeypatch.setattr(lazy_tensor.Recipe, "_computed", counted)
    yield count
