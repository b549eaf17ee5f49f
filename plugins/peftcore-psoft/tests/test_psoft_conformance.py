"""It passes the conformance suite."""

import matrix
from peftcore_psoft import PsoftConfig

from peftcore.testing import check_method


def test_conformance() -> None:
    matrix.check(check_method(PsoftConfig(r=4, psoft_alpha=4), compile_backend="eager"))
