"""It passes the conformance suite."""

import matrix
from peftcore_road import RoadConfig


def test_conformance() -> None:
    matrix.conformance(RoadConfig(group_size=8), compile_backend="eager")
