"""It passes the conformance suite."""

import matrix
from peftcore_ia3 import IA3Config

from peftcore.testing import check_method


def test_conformance() -> None:
    report = check_method(IA3Config(), compile_backend="eager")
    matrix.check(report)
