"""The method passes the conformance suite."""

from peftcore_ln_tuning import LNTuningConfig
from support import matrix


def test_conformance() -> None:
    matrix.conformance(LNTuningConfig(), compile_backend="eager")
