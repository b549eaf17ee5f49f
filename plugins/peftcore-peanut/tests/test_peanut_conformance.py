"""It passes the conformance suite."""

import matrix
from peftcore_peanut import PeanutConfig


def test_conformance() -> None:
    matrix.conformance(PeanutConfig(r=4, depth=1), compile_backend="eager")
