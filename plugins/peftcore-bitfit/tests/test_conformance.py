"""BitFit passes the conformance suite, on each family of models."""

import pytest
from peftcore_bitfit import BitFitConfig
from support import matrix

from peftcore.plugin import MERGE, check_method

BARE = dict.fromkeys(("Llama", "Gemma", "T5", "Qwen3-MoE"), "the model has no biases; add_missing=True adds them")


def test_conformance() -> None:
    matrix.conformance(BitFitConfig(), not_applicable=BARE)


@pytest.mark.parametrize("families", [["Llama", "Qwen2"], pytest.param(["T5", "Qwen3-MoE"], marks=pytest.mark.nightly)])
def test_conformance_of_added_biases(families: list[str]) -> None:
    excused = {MERGE: "the base has no place for an added bias"}
    config = BitFitConfig(add_missing=True)
    check_method(config, families=families, not_applicable=excused, checks=matrix.OWN_CHECKS)
