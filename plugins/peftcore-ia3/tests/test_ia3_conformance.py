"""It passes the conformance suite."""

import matrix
from peftcore_ia3 import IA3Config


def test_conformance() -> None:
    matrix.conformance(IA3Config(), compile_backend="eager")
