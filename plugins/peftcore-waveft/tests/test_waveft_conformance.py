"""The method passes the conformance suite."""

from peftcore_waveft import WaveFTConfig
from support import matrix


def test_conformance() -> None:
    matrix.conformance(WaveFTConfig(n_frequency=60, wavelet_family="db2", scaling=4.0), compile_backend="eager")
