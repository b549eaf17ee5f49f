"""It passes the conformance suite."""

import matrix
from peftcore_ln_tuning import LNTuningConfig

from peftcore.testing import check_method


def test_conformance() -> None:
    report = check_method(LNTuningConfig(), compile_backend="eager")
    matrix.check(report)
