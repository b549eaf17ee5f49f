"""It passes the conformance suite."""

import matrix
from peftcore_adalora import AdaLoraConfig

from peftcore.testing import check_method


def test_conformance() -> None:
    matrix.check(check_method(AdaLoraConfig(init_r=6, target_r=3, total_step=100), compile_backend="eager"))
