"""BitFit passes the conformance suite, on each family of models."""

import matrix
from peftcore_bitfit import BitFitConfig

from peftcore.plugin import CHECKS, COMPILE, MERGE, check_method

BARE = dict.fromkeys(("Llama", "Gemma", "T5", "Qwen3-MoE"), "the model has no biases; add_missing=True adds them")


def test_conformance() -> None:
    matrix.conformance(BitFitConfig(), not_applicable=BARE)


def test_conformance_of_added_biases() -> None:
    excused = {MERGE: "the base has no place for an added bias"}
    check_method(
        BitFitConfig(add_missing=True),
        families=["Llama", "Qwen2", "T5", "Qwen3-MoE"],
        not_applicable=excused,
        checks=[name for name in CHECKS if name != COMPILE],
    )
