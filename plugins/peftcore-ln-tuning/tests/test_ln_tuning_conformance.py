"""It passes the conformance suite."""

import matrix
from peftcore_ln_tuning import LNTuningConfig


def test_conformance() -> None:
    matrix.conformance(LNTuningConfig(), compile_backend="eager")
