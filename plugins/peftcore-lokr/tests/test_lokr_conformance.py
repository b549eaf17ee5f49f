"""It passes the conformance suite."""

import matrix
from peftcore_lokr import LoKrConfig

from peftcore.testing import check_method


def test_conformance() -> None:
    matrix.check(check_method(LoKrConfig(r=2, alpha=4), compile_backend="eager"))
