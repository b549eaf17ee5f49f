"""It passes the conformance suite."""

import matrix
from peftcore_hira import HiraConfig

from peftcore.testing import check_method


def test_conformance() -> None:
    matrix.check(check_method(HiraConfig(r=4), compile_backend="eager"))
