"""Prompt tuning passes the conformance suite, on each kind of model."""

import matrix
import pytest
import tiny
from peftcore_prompt_tuning import PromptTuningConfig

from peftcore.testing import CHECKS, check_method

NOT_APPLICABLE = {
    "identity at the start": "vectors before the input change the output, whatever their values",
    "merge equals forward, unmerge is bit exact": "a prompt is no change of a weight",
}
COMPILED = {"torch.compile(fullgraph=True)": "compiled on Llama, which takes less time"}
MODELS = {**tiny.MODELS, "roberta": tiny.roberta_classifier}


@pytest.mark.parametrize("kind", list(MODELS))
def test_conformance(kind: str) -> None:
    excused = NOT_APPLICABLE if kind == "llama" else {**NOT_APPLICABLE, **COMPILED}
    report = check_method(PromptTuningConfig(num_virtual_tokens=4), make_model=MODELS[kind], not_applicable=excused)
    if kind == "llama":
        matrix.check(report)


@pytest.mark.slow
def test_compiled_encoder_decoder() -> None:
    """Encoder, prompt and the longer cross-attention compile as one graph."""
    config = PromptTuningConfig(num_virtual_tokens=4)
    others = {name: "see test_conformance" for name in CHECKS if name not in COMPILED}
    check_method(config, make_model=tiny.t5, not_applicable=others, compile_backend="eager")
