"""Fixtures of all tests: the toy methods, installed."""

from collections.abc import Iterator

import pytest
import tiny


@pytest.fixture
def toys() -> Iterator[None]:
    """The toy methods `around`, `after`, `soft`, `prefix` and `train`, registered for one test."""
    with tiny.installed(*(tiny.method(kind, place) for kind, place in tiny.PLACES.items())):
        yield
