"""Bottleneck adapters pass the conformance suite, in each style, on each family of models."""

import matrix
import pytest
from peftcore_adapter import AdapterConfig

from peftcore.testing import CHECKS, COMPILE, MERGE, check_method

EXCUSED = {MERGE: "a non-linearity stands between the two projections: it is no change of a weight"}
PFEIFFER = AdapterConfig(placement="pfeiffer", original_ln_before=True, reduction_factor=4, non_linearity="gelu")
PARALLEL = AdapterConfig(is_parallel=True, scaling=4.0, bottleneck_size=6, cross_adapter=True)


def test_conformance() -> None:
    matrix.check(check_method(AdapterConfig(bottleneck_size=6), not_applicable=EXCUSED))


@pytest.mark.parametrize(
    ("style", "families"),
    [
        (PFEIFFER, ["BERT", "GPT-2", "ViT"]),
        (PARALLEL, ["T5", "Llama", "GPT-2", "BERT"]),
        pytest.param(PFEIFFER, ["T5", "Llama", "Gemma", "Qwen3-MoE"], marks=pytest.mark.slow),
    ],
)
def test_other_styles(style: AdapterConfig, families: list[str]) -> None:
    checks = [name for name in CHECKS if name != COMPILE]
    check_method(style, families=families, not_applicable=EXCUSED, checks=checks)


@pytest.mark.slow
@pytest.mark.parametrize("style", [PFEIFFER, PARALLEL], ids=["pfeiffer", "parallel"])
def test_other_styles_compile(style: AdapterConfig) -> None:
    for family in ("BERT", "T5", "GPT-2"):
        check_method(style, families=[family], checks=[COMPILE], compile_backend="eager")
