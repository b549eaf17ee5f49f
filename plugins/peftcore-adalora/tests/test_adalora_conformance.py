"""The method passes the conformance suite."""

from peftcore_adalora import AdaLoraConfig
from support import matrix


def test_conformance() -> None:
    matrix.conformance(AdaLoraConfig(init_r=6, target_r=3, total_step=100), compile_backend="eager")
