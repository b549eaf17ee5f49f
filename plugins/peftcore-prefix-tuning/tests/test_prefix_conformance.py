"""Prefix tuning passes the conformance suite, on each family of models, with and without its projection."""

import pytest
from peftcore_prefix_tuning import PrefixTuningConfig
from support import matrix, tiny

from peftcore.plugin import CHECKS, COMPILE, IDENTITY, MERGE, PEFT_READS, PEFT_WRITES, check_method

EXCUSED = {
    IDENTITY: "keys before those of the input take part of the attention, whatever their values",
    MERGE: "a prefix is not a change of a weight",
}
RENAMED = "may ask classifiers for an argument that transformers 5.24 renamed, see test_prefix_against_peft.py"
NOT_COMPILED = [name for name in CHECKS if name != COMPILE]  # it takes seconds; done with Llama


def of_classifiers(family: str) -> dict[str, str]:
    return {f"{family}: {name}": RENAMED for name in (PEFT_READS, PEFT_WRITES)}


def test_conformance() -> None:
    excused = {**EXCUSED, **of_classifiers("BERT"), "ViT": "an image has no tokens that a prefix could precede"}
    matrix.conformance(PrefixTuningConfig(num_virtual_tokens=4), not_applicable=excused)


@pytest.mark.nightly
@pytest.mark.parametrize("family", ["GPT-2", "T5"])
def test_all_checks_on_another_family(family: str) -> None:
    config = PrefixTuningConfig(num_virtual_tokens=4)
    check_method(config, families=[family], not_applicable=EXCUSED, checks=NOT_COMPILED)


def test_on_a_classifier_with_positions_after_the_padding() -> None:
    excused = {**EXCUSED, **of_classifiers("roberta_classifier")}
    config = PrefixTuningConfig(num_virtual_tokens=4)
    check_method(config, families=[tiny.roberta_classifier], not_applicable=excused, checks=NOT_COMPILED)


def test_conformance_with_projection() -> None:
    config = PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=7)
    check_method(config, families=["Llama", "T5"], not_applicable=EXCUSED, checks=matrix.OWN_CHECKS)
