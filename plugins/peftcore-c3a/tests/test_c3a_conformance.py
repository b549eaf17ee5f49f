"""It passes the conformance suite."""

import matrix
from peftcore_c3a import C3AConfig

from peftcore.testing import check_method


def test_conformance() -> None:
    matrix.check(check_method(C3AConfig(block_size=8, init_weights=True), compile_backend="eager"))
