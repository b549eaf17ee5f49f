"""It passes the conformance suite."""

import matrix
from peftcore_pvera import PveraConfig


def test_conformance() -> None:
    matrix.conformance(PveraConfig(r=8), compile_backend="eager")
