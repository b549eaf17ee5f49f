"""The method passes the conformance suite."""

from peftcore_vera import VeraConfig
from support import matrix


def test_conformance() -> None:
    matrix.conformance(VeraConfig(r=8), compile_backend="eager")
