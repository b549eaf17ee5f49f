"""It passes the conformance suite."""

import matrix
from peftcore_adalora import AdaLoraConfig


def test_conformance() -> None:
    matrix.conformance(AdaLoraConfig(init_r=6, target_r=3, total_step=100), compile_backend="eager")
