"""It passes the conformance suite."""

from peftcore_dora import DoraConfig
from support import matrix


def test_conformance() -> None:
    matrix.conformance(DoraConfig(r=4, lora_alpha=8), compile_backend="eager")
