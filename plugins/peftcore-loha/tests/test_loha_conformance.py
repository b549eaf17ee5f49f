"""It passes the conformance suite."""

import matrix
from peftcore_loha import LoHaConfig

from peftcore.testing import check_method


def test_conformance() -> None:
    matrix.check(check_method(LoHaConfig(r=3, alpha=6), compile_backend="eager"))
