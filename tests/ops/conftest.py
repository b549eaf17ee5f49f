"""`level`: a test at every SIMD level."""

from collections.abc import Iterator

import pytest

from peftcore import ops

LEVELS = ops.extension.cpu_levels() if ops.extension is not None else ["reference"]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[None]:
    if ops.extension is None:
        yield
        return
    before = ops.extension.cpu_level()
    ops.extension.set_cpu_level(request.param)
    yield
    ops.extension.set_cpu_level(before)
