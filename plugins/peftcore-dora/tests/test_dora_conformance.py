"""It passes the conformance suite."""

import matrix
from peftcore_dora import DoraConfig


def test_conformance() -> None:
    matrix.conformance(DoraConfig(r=4, lora_alpha=8), compile_backend="eager")
