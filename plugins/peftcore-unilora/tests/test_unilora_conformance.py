"""The method passes the conformance suite."""

from peftcore_unilora import UniLoraConfig
from support import matrix


def test_conformance() -> None:
    excuses = {
        "identity at the start": "no factor is zero at the start, as in PEFT",
    }
    matrix.conformance(UniLoraConfig(theta_d_length=64), compile_backend="eager", not_applicable=excuses)
