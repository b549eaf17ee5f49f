"""The method passes the conformance suite."""

from peftcore_supertuning import SupertuningConfig
from support import matrix


def test_conformance() -> None:
    matrix.conformance(SupertuningConfig(sparsity=0.9, r=2), compile_backend="eager")
