"""QLoRA passes the conformance suite on a quantized base, on each kind of model."""

import pytest
import tiny
from peftcore_qlora import QLoraConfig

import peftcore
from peftcore.testing import check_method

MERGING = {
    "merge equals forward, unmerge is bit exact": "quantizing again loses the adapter; merge measures that and refuses"
}
GENERATING = {"generate, with and without cache, equals one full forward", "left-padded batches"}


@pytest.mark.parametrize("kind", list(tiny.MODELS))
def test_conformance(kind: str) -> None:
    report = check_method(
        QLoraConfig(r=4, lora_alpha=8),
        make_model=lambda: peftcore.quantize(tiny.MODELS[kind]()),
        not_applicable=MERGING,
        compile_backend="aot_eager" if kind == "llama" else "eager",
    )
    excused = {result.name for result in report.results if result.reason}
    assert excused == set(MERGING) | (set() if kind in ("llama", "gpt2") else GENERATING)
