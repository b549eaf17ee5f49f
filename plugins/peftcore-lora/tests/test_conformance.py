"""LoRA passes the conformance suite, on each family of models."""

import pytest
from peftcore_lora import LoraConfig
from support import matrix

from peftcore.plugin import COMPILE, check_method


def test_conformance() -> None:
    report = matrix.conformance(LoraConfig(r=4, lora_alpha=8))
    reasons = {result.reason for result in report.results}
    assert reasons == {None, "its adapters share no tensor", "its adapters have no neutral tensors"}


@pytest.mark.nightly
@pytest.mark.parametrize("family", ["GPT-2", "T5"])
def test_all_checks_on_another_family(family: str) -> None:
    check_method(LoraConfig(r=4, lora_alpha=8), families=[family], compile_backend="eager")  # traces the whole graph


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_conformance_with_inductor() -> None:
    check_method(LoraConfig(r=4, lora_alpha=8), families=["Llama"], checks=[COMPILE], compile_backend="inductor")
