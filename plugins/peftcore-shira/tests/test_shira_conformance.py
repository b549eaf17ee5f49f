"""The method passes the conformance suite."""

from peftcore_shira import ShiraConfig
from support import matrix


def test_conformance() -> None:
    matrix.conformance(ShiraConfig(r=4), compile_backend="eager")
