"""The method passes the conformance suite."""

from peftcore_hra import HRAConfig
from support import matrix

from peftcore.plugin import IDENTITY

ROUNDED = "two reflections cancel out up to rounding"


def test_conformance() -> None:
    matrix.conformance(HRAConfig(r=4), compile_backend="eager", not_applicable={IDENTITY: ROUNDED})
