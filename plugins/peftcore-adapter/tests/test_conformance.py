"""Bottleneck adapters pass the conformance suite, in each style, on each family of models."""

import pytest
from peftcore_adapter import AdapterConfig
from support import matrix

from peftcore.plugin import CHECKS, COMPILE, MERGE, check_method

EXCUSED = {MERGE: "it has a non-linearity, so it is not a change of a weight"}
PFEIFFER = AdapterConfig(placement="pfeiffer", original_ln_before=True, reduction_factor=4, non_linearity="gelu")
PARALLEL = AdapterConfig(is_parallel=True, scaling=4.0, bottleneck_size=6, cross_adapter=True)
COMPACTER = AdapterConfig(phm_layer=True, bottleneck_size=8, non_linearity="gelu")
PLUS = AdapterConfig(
    placement="pfeiffer",
    original_ln_before=True,
    original_ln_after=False,
    residual_before_ln=False,
    reduction_factor=4,
    scaling="channel",
    stochastic_depth=0.1,
)
INVERTIBLE = AdapterConfig(bottleneck_size=6, inv_adapter="nice", ln_after=True, ln_before=True, scaling="learned")
GATED = AdapterConfig(bottleneck_size=6, use_gating=True, non_linearity="tanh")
OF_ROW = "the gate is a mean over all tokens of a row, padding included, as in `adapters`"


def test_conformance() -> None:
    matrix.conformance(AdapterConfig(bottleneck_size=6), not_applicable=EXCUSED)


@pytest.mark.parametrize(
    ("style", "families"),
    [
        (PFEIFFER, ["BERT", "GPT-2", "ViT"]),
        (PARALLEL, ["T5", "GPT-2"]),
        (COMPACTER, ["BERT"]),
        (PLUS, ["ViT", "BERT"]),
        (INVERTIBLE, ["BERT", "GPT-2"]),
        pytest.param(PARALLEL, ["Llama", "BERT"], marks=pytest.mark.nightly),
        pytest.param(COMPACTER, ["T5", "Llama", "GPT-2", "ViT", "Gemma", "Qwen3-MoE"], marks=pytest.mark.nightly),
        pytest.param(PLUS, ["T5", "Llama", "GPT-2", "Gemma", "Qwen3-MoE"], marks=pytest.mark.nightly),
        pytest.param(INVERTIBLE, ["Llama", "Gemma", "Qwen3-MoE"], marks=pytest.mark.nightly),
        pytest.param(PFEIFFER, ["T5", "Llama", "Gemma", "Qwen3-MoE"], marks=pytest.mark.nightly),
    ],
)
def test_other_styles(style: AdapterConfig, families: list[str]) -> None:
    check_method(style, families=families, not_applicable=EXCUSED, checks=matrix.OWN_CHECKS)


@pytest.mark.parametrize(
    ("family", "generates"),
    [
        ("BERT", []),
        pytest.param("ViT", [], marks=pytest.mark.nightly),
        pytest.param("T5", ["generate"], marks=pytest.mark.nightly),
        pytest.param("Llama", ["generate"], marks=pytest.mark.nightly),
    ],
)
def test_gated(family: str, generates: list[str]) -> None:
    rows = {f"{family}: {check}": OF_ROW for check in CHECKS if check.startswith(tuple(generates))}
    check_method(GATED, families=[family], not_applicable=EXCUSED | rows, checks=[c for c in CHECKS if c != COMPILE])


@pytest.mark.nightly
@pytest.mark.parametrize(
    "style",
    [PFEIFFER, PARALLEL, COMPACTER, PLUS, GATED],
    ids=["pfeiffer", "parallel", "compacter", "adapter plus", "gated"],
)
def test_other_styles_compile(style: AdapterConfig) -> None:
    for family in ("BERT", "T5", "GPT-2"):
        check_method(style, families=[family], checks=[COMPILE], compile_backend="eager")
