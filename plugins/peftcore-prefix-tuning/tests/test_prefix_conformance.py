"""Prefix tuning passes the conformance suite, on each kind of model, with and without its projection."""

import matrix
import pytest
import tiny
from peftcore_prefix_tuning import PrefixTuningConfig

from peftcore.testing import check_method

NOT_APPLICABLE = {
    "identity at the start": "keys before those of the input take part of the attention, whatever their values",
    "merge equals forward, unmerge is bit exact": "a prefix is no change of a weight",
}
COMPILED = {"torch.compile(fullgraph=True)": "compiled on Llama, which takes less time"}
PEFT = {
    "Hugging Face PEFT computes the same from the file": "it asks classifiers for an argument that is renamed, see "
    "test_prefix_against_peft.py"
}
MODELS = {**tiny.MODELS, "roberta": tiny.roberta_classifier}


@pytest.mark.parametrize("kind", list(MODELS))
def test_conformance(kind: str) -> None:
    excused = NOT_APPLICABLE if kind == "llama" else {**NOT_APPLICABLE, **COMPILED}
    if kind in ("bert", "roberta"):
        excused |= PEFT
    report = check_method(PrefixTuningConfig(num_virtual_tokens=4), make_model=MODELS[kind], not_applicable=excused)
    if kind == "llama":
        matrix.check(report)


def test_conformance_with_projection() -> None:
    config = PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=7)
    check_method(config, not_applicable={**NOT_APPLICABLE, **COMPILED})
