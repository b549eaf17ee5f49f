"""The method passes the conformance suite."""

from peftcore_miss import MissConfig
from support import matrix


def test_conformance() -> None:
    matrix.conformance(MissConfig(r=8), compile_backend="eager")
