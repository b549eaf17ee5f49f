"""Fixtures of all tests: the toy methods, installed."""

import sys
from collections.abc import Iterator

import pytest
import tiny


@pytest.fixture
def toys() -> Iterator[None]:
    """The toy methods `around`, `after`, `on-weight`, `soft`, `prefix` and `train`, registered for one test."""
    with tiny.installed(*(tiny.method(kind, place) for kind, place in tiny.PLACES.items())):
        yield


@pytest.fixture
def switching_often() -> Iterator[None]:
    """Threads take turns every 0.1 ms, for one test."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)
