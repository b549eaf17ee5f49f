"""It passes the conformance suite."""

import pytest
from peftcore_reft import ReftConfig
from support import matrix

from peftcore.plugin import CHECKS, COMPILE, MERGE, check_method

NO_WEIGHT = "it edits hidden states of some tokens"


def test_conformance() -> None:
    matrix.conformance(ReftConfig(r=2, dropout=0.0), compile_backend="eager", not_applicable={MERGE: NO_WEIGHT})


@pytest.mark.parametrize(
    "config", [ReftConfig(r=2, dropout=0.0, orthogonality=False, subtract_projection=False, non_linearity="gelu")]
)
def test_direft(config: ReftConfig) -> None:
    checks = [check for check in CHECKS if check != COMPILE]
    check_method(config, families=["Llama"], not_applicable={MERGE: NO_WEIGHT}, checks=checks)
