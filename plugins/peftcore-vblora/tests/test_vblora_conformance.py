"""The method passes the conformance suite."""

from peftcore_vblora import VBLoRAConfig
from support import matrix


def test_conformance() -> None:
    excuses = {
        "identity at the start": "no factor is zero at the start, as in the paper",
        "T5: gradient checkpointing": "may be rounded apart: T5 does not scale its attention",
    }
    config = VBLoRAConfig(r=2, vector_length=8, num_vectors=16)
    matrix.conformance(config, compile_backend="eager", not_applicable=excuses)
