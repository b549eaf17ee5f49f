"""The method passes the conformance suite."""

from peftcore_glora import GloraConfig
from support import matrix


def test_conformance() -> None:
    matrix.conformance(GloraConfig(r=2), compile_backend="eager")
