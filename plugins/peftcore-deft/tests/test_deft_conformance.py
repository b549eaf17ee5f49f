"""The method passes the conformance suite."""

from peftcore_deft import DeftConfig
from support import matrix


def test_conformance() -> None:
    excuses = {
        "identity at the start": "rounded apart: what is taken out is put back by another product",
    }
    matrix.conformance(DeftConfig(r=4), compile_backend="eager", not_applicable=excuses)
