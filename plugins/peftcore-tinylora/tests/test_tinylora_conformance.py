"""It passes the conformance suite."""

import matrix
from peftcore_tinylora import TinyLoraConfig


def test_conformance() -> None:
    matrix.conformance(TinyLoraConfig(u=5), compile_backend="eager")
