"""The method passes the conformance suite."""

from peftcore_delora import DeloraConfig
from support import matrix


def test_conformance() -> None:
    matrix.conformance(DeloraConfig(r=3), compile_backend="eager")
