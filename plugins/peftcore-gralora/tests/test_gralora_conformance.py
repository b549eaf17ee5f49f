"""The method passes the conformance suite."""

from peftcore_gralora import GraloraConfig
from support import matrix


def test_conformance() -> None:
    matrix.conformance(GraloraConfig(r=4, hybrid_r=2, alpha=6), compile_backend="eager")
