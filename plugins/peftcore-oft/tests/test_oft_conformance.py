"""It passes the conformance suite."""

import matrix
from peftcore_oft import OFTConfig


def test_conformance() -> None:
    matrix.conformance(OFTConfig(oft_block_size=8), compile_backend="eager")
