"""It passes the conformance suite."""

import matrix
from peftcore_miss import MissConfig


def test_conformance() -> None:
    matrix.conformance(MissConfig(r=8), compile_backend="eager")
