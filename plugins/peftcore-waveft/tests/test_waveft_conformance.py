"""It passes the conformance suite."""

import matrix
from peftcore_waveft import WaveFTConfig

from peftcore.testing import check_method


def test_conformance() -> None:
    matrix.check(check_method(WaveFTConfig(n_frequency=60, wavelet_family="db2", scaling=4.0), compile_backend="eager"))
