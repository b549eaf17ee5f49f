"""It passes the conformance suite."""

import matrix
from peftcore_delora import DeloraConfig

from peftcore.testing import check_method


def test_conformance() -> None:
    matrix.check(check_method(DeloraConfig(r=3), compile_backend="eager"))
