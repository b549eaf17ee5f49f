"""It passes the conformance suite."""

import matrix
from peftcore_oft import OFTConfig

from peftcore.testing import check_method


def test_conformance() -> None:
    matrix.check(check_method(OFTConfig(oft_block_size=8), compile_backend="eager"))
