"""LoRA passes the conformance suite, on each kind of model."""

import matrix
import pytest
import tiny
from peftcore_lora import LoraConfig

from peftcore.testing import check_method


@pytest.mark.parametrize("kind", list(tiny.MODELS))
def test_conformance(kind: str) -> None:
    report = check_method(LoraConfig(r=4, lora_alpha=8), make_model=tiny.MODELS[kind])
    assert {result.reason for result in report.results} == {None, *(["the model does not generate"] * (kind == "bert"))}
    if kind == "llama":
        matrix.check(report)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_conformance_with_inductor() -> None:
    check_method(LoraConfig(r=4, lora_alpha=8), compile_backend="inductor")
