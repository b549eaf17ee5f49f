"""Bottleneck adapters pass the conformance suite, on each kind of model."""

import matrix
import pytest
import tiny
from peftcore_adapter import AdapterConfig

from peftcore.testing import check_method

MERGING = "merge equals forward, unmerge is bit exact"
REASON = "a non-linearity stands between the two projections: it is no change of a weight"
ENCODERS = {
    "generate, with and without cache, equals one full forward",
    "generate for rows of different lengths, with and without cache, equals each row alone",
}
PEFT = "Hugging Face PEFT computes the same from the file"
STYLES = {
    "houlsby": AdapterConfig(bottleneck_size=6),
    "pfeiffer": AdapterConfig(placement="pfeiffer", original_ln_before=True, reduction_factor=4, non_linearity="gelu"),
    "parallel": AdapterConfig(is_parallel=True, scaling=4.0, bottleneck_size=6, cross_adapter=True),
}
PAIRS = [("llama", "houlsby"), ("gpt2", "parallel"), ("bert", "pfeiffer"), ("t5", "parallel")]
REST = [(kind, style) for kind in tiny.MODELS for style in STYLES if (kind, style) not in PAIRS]


@pytest.mark.parametrize(("kind", "style"), PAIRS + [pytest.param(*pair, marks=pytest.mark.slow) for pair in REST])
def test_conformance(kind: str, style: str) -> None:
    backend = "aot_eager" if (kind, style) == PAIRS[0] else "eager"  # "eager" traces the whole graph and is quick
    report = check_method(
        STYLES[style], make_model=tiny.MODELS[kind], not_applicable={MERGING: REASON}, compile_backend=backend
    )
    excused = {result.name for result in report.results if result.reason}
    assert excused == {MERGING, PEFT} | (ENCODERS if kind == "bert" else set())
    if (kind, style) == PAIRS[0]:
        matrix.check(report)
