"""It passes the conformance suite."""

import matrix
from peftcore_psoft import PsoftConfig


def test_conformance() -> None:
    matrix.conformance(PsoftConfig(r=4, psoft_alpha=4), compile_backend="eager")
