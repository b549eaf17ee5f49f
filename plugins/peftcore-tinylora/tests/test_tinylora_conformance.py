"""It passes the conformance suite."""

import matrix
from peftcore_tinylora import TinyLoraConfig

from peftcore.testing import check_method


def test_conformance() -> None:
    matrix.check(check_method(TinyLoraConfig(u=5), compile_backend="eager"))
