"""It passes the conformance suite."""

import matrix
from peftcore_delora import DeloraConfig


def test_conformance() -> None:
    matrix.conformance(DeloraConfig(r=3), compile_backend="eager")
