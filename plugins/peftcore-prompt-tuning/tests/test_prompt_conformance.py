"""Prompt tuning passes the conformance suite, on each kind of model."""

import pytest
import tiny
from peftcore_prompt_tuning import PromptTuningConfig

from peftcore.testing import check_method

NOT_APPLICABLE = {
    "identity at the start": "vectors before the input change the output, whatever their values",
    "merge equals forward, unmerge is bit exact": "a prompt is no change of a weight",
}
MODELS = {**tiny.MODELS, "roberta": tiny.roberta_classifier}


@pytest.mark.parametrize("kind", list(MODELS))
def test_conformance(kind: str) -> None:
    check_method(
        PromptTuningConfig(num_virtual_tokens=4),
        make_model=MODELS[kind],
        not_applicable=NOT_APPLICABLE,
        compile_backend="aot_eager" if kind == "llama" else "eager",
    )
