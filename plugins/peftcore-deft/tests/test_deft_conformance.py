"""It passes the conformance suite."""

import matrix
from peftcore_deft import DeftConfig


def test_conformance() -> None:
    excuses = {
        "identity at the start": "rounded apart: what is taken out is put back by another product",
    }
    matrix.conformance(DeftConfig(r=4), compile_backend="eager", not_applicable=excuses)
