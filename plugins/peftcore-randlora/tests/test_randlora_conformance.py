"""The method passes the conformance suite."""

from peftcore_randlora import RandLoraConfig
from support import matrix


def test_conformance() -> None:
    matrix.conformance(RandLoraConfig(r=8, randlora_alpha=8), compile_backend="eager")
