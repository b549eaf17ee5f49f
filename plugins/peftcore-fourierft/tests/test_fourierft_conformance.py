"""The method passes the conformance suite."""

from peftcore_fourierft import FourierFTConfig
from support import matrix


def test_conformance() -> None:
    matrix.conformance(FourierFTConfig(n_frequency=40, init_weights=True), compile_backend="eager")
