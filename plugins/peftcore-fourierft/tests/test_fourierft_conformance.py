"""It passes the conformance suite."""

import matrix
from peftcore_fourierft import FourierFTConfig


def test_conformance() -> None:
    matrix.conformance(FourierFTConfig(n_frequency=40, init_weights=True), compile_backend="eager")
