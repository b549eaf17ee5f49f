"""It passes the conformance suite."""

import matrix
from peftcore_dora import DoraConfig

from peftcore.testing import check_method


def test_conformance() -> None:
    matrix.check(check_method(DoraConfig(r=4, lora_alpha=8), compile_backend="eager"))
