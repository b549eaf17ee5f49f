"""`level`: a test at every SIMD level."""

from collections.abc import Iterator

import pytest
from levels import LEVELS, at_level


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with at_level(request.param) as name:
        yield name
