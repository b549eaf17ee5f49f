"""It passes the conformance suite."""

import matrix
from peftcore_hira import HiraConfig


def test_conformance() -> None:
    matrix.conformance(HiraConfig(r=4), compile_backend="eager")
