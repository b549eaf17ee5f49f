"""It passes the conformance suite."""

import matrix
from peftcore_glora import GloraConfig


def test_conformance() -> None:
    matrix.conformance(GloraConfig(r=2), compile_backend="eager")
