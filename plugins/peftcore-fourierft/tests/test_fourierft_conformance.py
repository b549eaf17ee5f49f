"""It passes the conformance suite."""

import matrix
from peftcore_fourierft import FourierFTConfig

from peftcore.testing import check_method


def test_conformance() -> None:
    matrix.check(check_method(FourierFTConfig(n_frequency=40, init_weights=True), compile_backend="eager"))
