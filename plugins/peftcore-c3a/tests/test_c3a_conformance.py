"""The method passes the conformance suite."""

from peftcore_c3a import C3AConfig
from support import matrix


def test_conformance() -> None:
    matrix.conformance(C3AConfig(block_size=8, init_weights=True), compile_backend="eager")
