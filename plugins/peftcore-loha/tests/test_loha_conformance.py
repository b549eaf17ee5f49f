"""The method passes the conformance suite."""

from peftcore_loha import LoHaConfig
from support import matrix


def test_conformance() -> None:
    matrix.conformance(LoHaConfig(r=3, alpha=6), compile_backend="eager")
