"""It passes the conformance suite."""

import matrix
from peftcore_boft import BOFTConfig

from peftcore.testing import check_method


def test_conformance() -> None:
    matrix.check(check_method(BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1), compile_backend="eager"))
