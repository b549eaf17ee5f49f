"""It passes the conformance suite."""

import matrix
from peftcore_pvera import PveraConfig

from peftcore.testing import check_method


def test_conformance() -> None:
    matrix.check(check_method(PveraConfig(r=8), compile_backend="eager"))
