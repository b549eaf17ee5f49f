"""It passes the conformance suite."""

import matrix
from peftcore_loha import LoHaConfig


def test_conformance() -> None:
    matrix.conformance(LoHaConfig(r=3, alpha=6), compile_backend="eager")
