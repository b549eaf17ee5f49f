"""`level`: a test at every SIMD level. `bnb`: bitsandbytes, without which a test is skipped."""

import warnings
from collections.abc import Iterator
from types import ModuleType

import pytest
from support.levels import LEVELS, at_level


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with at_level(request.param) as name:
        yield name


@pytest.fixture(scope="session")
def bnb() -> ModuleType:
    """Return bitsandbytes.functional."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes.functional")
