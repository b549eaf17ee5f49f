"""It passes the conformance suite."""

import matrix
from peftcore_supertuning import SupertuningConfig


def test_conformance() -> None:
    matrix.conformance(SupertuningConfig(sparsity=0.9, r=2), compile_backend="eager")
