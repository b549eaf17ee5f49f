"""Prompt tuning passes the conformance suite, on each family of models."""

import pytest
from peftcore_prompt_tuning import PromptTuningConfig
from support import matrix, tiny

from peftcore.plugin import CHECKS, COMPILE, IDENTITY, MERGE, check_method

CONFIG = PromptTuningConfig(num_virtual_tokens=4)
EXCUSED = {
    IDENTITY: "vectors before the input change the output, whatever their values",
    MERGE: "a prompt is not a change of a weight",
}
NOT_COMPILED = [name for name in CHECKS if name != COMPILE]  # it takes seconds; done with Llama


def test_conformance() -> None:
    excused = {**EXCUSED, "ViT": "an image has no tokens that vectors could precede"}
    matrix.conformance(CONFIG, not_applicable=excused)


@pytest.mark.nightly
@pytest.mark.parametrize("family", ["GPT-2", "T5", tiny.roberta_classifier])
def test_all_checks_on_another_family(family) -> None:
    check_method(CONFIG, families=[family], not_applicable=EXCUSED, checks=NOT_COMPILED)


@pytest.mark.nightly
def test_compiled_encoder_decoder() -> None:
    """Encoder, prompt and the longer cross-attention compile as one graph."""
    check_method(CONFIG, families=["T5"], checks=[COMPILE], compile_backend="eager")
