"""The method passes the conformance suite."""

from peftcore_lokr import LoKrConfig
from support import matrix


def test_conformance() -> None:
    matrix.conformance(LoKrConfig(r=2, alpha=4), compile_backend="eager")
