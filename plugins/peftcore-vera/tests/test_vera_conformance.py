"""It passes the conformance suite."""

import matrix
from peftcore_vera import VeraConfig


def test_conformance() -> None:
    matrix.conformance(VeraConfig(r=8), compile_backend="eager")
