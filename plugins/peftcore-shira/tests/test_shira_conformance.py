"""It passes the conformance suite."""

import matrix
from peftcore_shira import ShiraConfig


def test_conformance() -> None:
    matrix.conformance(ShiraConfig(r=4), compile_backend="eager")
