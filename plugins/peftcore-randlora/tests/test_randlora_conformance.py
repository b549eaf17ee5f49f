"""It passes the conformance suite."""

import matrix
from peftcore_randlora import RandLoraConfig

from peftcore.testing import check_method


def test_conformance() -> None:
    matrix.check(check_method(RandLoraConfig(r=8, randlora_alpha=8), compile_backend="eager"))
