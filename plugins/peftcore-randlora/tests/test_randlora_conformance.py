"""It passes the conformance suite."""

import matrix
from peftcore_randlora import RandLoraConfig


def test_conformance() -> None:
    matrix.conformance(RandLoraConfig(r=8, randlora_alpha=8), compile_backend="eager")
