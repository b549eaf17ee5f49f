"""The method passes the conformance suite."""

from peftcore_oft import OFTConfig
from support import matrix


def test_conformance() -> None:
    matrix.conformance(OFTConfig(oft_block_size=8), compile_backend="eager")
