"""It passes the conformance suite."""

import matrix
from peftcore_supertuning import SupertuningConfig

from peftcore.testing import check_method


def test_conformance() -> None:
    matrix.check(check_method(SupertuningConfig(sparsity=0.9, r=2), compile_backend="eager"))
