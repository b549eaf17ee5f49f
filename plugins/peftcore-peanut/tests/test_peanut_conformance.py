"""It passes the conformance suite."""

import matrix
from peftcore_peanut import PeanutConfig

from peftcore.testing import check_method


def test_conformance() -> None:
    matrix.check(check_method(PeanutConfig(r=4, depth=1), compile_backend="eager"))
