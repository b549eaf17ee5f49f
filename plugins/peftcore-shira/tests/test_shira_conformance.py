"""It passes the conformance suite."""

import matrix
from peftcore_shira import ShiraConfig

from peftcore.testing import check_method


def test_conformance() -> None:
    matrix.check(check_method(ShiraConfig(r=4), compile_backend="eager"))
