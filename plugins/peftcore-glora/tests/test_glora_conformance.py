"""It passes the conformance suite."""

import matrix
from peftcore_glora import GloraConfig

from peftcore.testing import check_method


def test_conformance() -> None:
    matrix.check(check_method(GloraConfig(r=2), compile_backend="eager"))
