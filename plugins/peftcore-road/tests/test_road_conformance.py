"""It passes the conformance suite."""

import matrix
from peftcore_road import RoadConfig

from peftcore.testing import check_method


def test_conformance() -> None:
    matrix.check(check_method(RoadConfig(group_size=8), compile_backend="eager"))
