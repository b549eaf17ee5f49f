"""The method passes the conformance suite."""

from peftcore_ia3 import IA3Config
from support import matrix


def test_conformance() -> None:
    matrix.conformance(IA3Config(), compile_backend="eager")
