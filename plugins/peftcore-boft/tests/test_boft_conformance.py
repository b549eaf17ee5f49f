"""The method passes the conformance suite."""

from peftcore_boft import BOFTConfig
from support import matrix


def test_conformance() -> None:
    matrix.conformance(BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1), compile_backend="eager")
