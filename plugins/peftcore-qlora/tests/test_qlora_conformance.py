"""QLoRA passes the conformance suite on a quantized base, on each kind of model."""

import matrix
import pytest
import tiny
from peftcore_qlora import QLoraConfig

import peftcore
from peftcore.testing import check_method

MERGING = {
    "merge equals forward, unmerge is bit exact": "quantizing again loses the adapter; merge measures that and refuses"
}
COMPILING = {"torch.compile(fullgraph=True)": "tracing takes half a minute; done with Llama"}
ENCODERS = {
    "generate, with and without cache, equals one full forward",
    "generate for rows of different lengths, with and without cache, equals each row alone",
}
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("bert", "t5")]


@pytest.mark.parametrize("kind", ["llama", "gpt2", *SLOW])
def test_conformance(kind: str) -> None:
    excuses = MERGING | ({} if kind == "llama" else COMPILING)
    report = check_method(
        QLoraConfig(r=4, lora_alpha=8),
        make_model=lambda: peftcore.quantize(tiny.MODELS[kind]()),
        not_applicable=excuses,
    )
    excused = {result.name for result in report.results if result.reason}
    assert excused == set(excuses) | (ENCODERS if kind == "bert" else set())
    if kind == "llama":
        matrix.check(report)
