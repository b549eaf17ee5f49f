"""It passes the conformance suite."""

import matrix
from peftcore_vera import VeraConfig

from peftcore.testing import check_method


def test_conformance() -> None:
    report = check_method(VeraConfig(r=8), compile_backend="eager")
    matrix.check(report)
