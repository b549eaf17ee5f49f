"""The method passes the conformance suite."""

from peftcore_pvera import PveraConfig
from support import matrix


def test_conformance() -> None:
    matrix.conformance(PveraConfig(r=8), compile_backend="eager")
