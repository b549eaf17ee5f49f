"""It passes the conformance suite."""

import matrix
from peftcore_miss import MissConfig

from peftcore.testing import check_method


def test_conformance() -> None:
    matrix.check(check_method(MissConfig(r=8), compile_backend="eager"))
