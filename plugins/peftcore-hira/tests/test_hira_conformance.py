"""The method passes the conformance suite."""

from peftcore_hira import HiraConfig
from support import matrix


def test_conformance() -> None:
    matrix.conformance(HiraConfig(r=4), compile_backend="eager")
