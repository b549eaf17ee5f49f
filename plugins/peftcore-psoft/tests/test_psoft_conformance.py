"""The method passes the conformance suite."""

from peftcore_psoft import PsoftConfig
from support import matrix


def test_conformance() -> None:
    matrix.conformance(PsoftConfig(r=4, psoft_alpha=4), compile_backend="eager")
