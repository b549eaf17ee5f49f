"""It passes the conformance suite."""

import matrix
from peftcore_gralora import GraloraConfig

from peftcore.testing import check_method


def test_conformance() -> None:
    matrix.check(check_method(GraloraConfig(r=4, hybrid_r=2, alpha=6), compile_backend="eager"))
