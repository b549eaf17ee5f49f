"""The method passes the conformance suite."""

from peftcore_tinylora import TinyLoraConfig
from support import matrix


def test_conformance() -> None:
    matrix.conformance(TinyLoraConfig(u=5), compile_backend="eager")
