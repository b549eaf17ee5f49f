"""The fixture of toy methods."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support import tiny


@pytest.fixture
def toys() -> Iterator[None]:
    """The toy methods `around`, `after`, `on-weight`, `soft`, `prefix` and `train`, registered for one test."""
    with tiny.installed(*(tiny.method(kind, place) for kind, place in tiny.PLACES.items())):
        yield
