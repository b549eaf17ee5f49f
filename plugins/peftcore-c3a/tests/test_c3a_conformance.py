"""It passes the conformance suite."""

import matrix
from peftcore_c3a import C3AConfig


def test_conformance() -> None:
    matrix.conformance(C3AConfig(block_size=8, init_weights=True), compile_backend="eager")
