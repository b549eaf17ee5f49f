"""The method passes the conformance suite."""

from peftcore_road import RoadConfig
from support import matrix


def test_conformance() -> None:
    matrix.conformance(RoadConfig(group_size=8), compile_backend="eager")
