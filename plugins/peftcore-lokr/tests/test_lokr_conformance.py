"""It passes the conformance suite."""

import matrix
from peftcore_lokr import LoKrConfig


def test_conformance() -> None:
    matrix.conformance(LoKrConfig(r=2, alpha=4), compile_backend="eager")
