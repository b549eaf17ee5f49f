"""The method passes the conformance suite."""

from peftcore_peanut import PeanutConfig
from support import matrix


def test_conformance() -> None:
    matrix.conformance(PeanutConfig(r=4, depth=1), compile_backend="eager")
