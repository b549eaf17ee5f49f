"""QLoRA passes the conformance suite, on each family of models, which it prepares."""

import matrix
import pytest
from mixtures import mixture
from peftcore_qlora import QLoraConfig
from quantized import llama
from torch import nn

from peftcore.plugin import MERGE
from peftcore.testing import CHECKS, COMPILE, check_method

EXCUSED = {MERGE: "quantizing again loses the adapter; merge measures that and refuses"}


def test_conformance() -> None:
    # With a larger alpha some layers lose just less than the tenth from which merge refuses.
    matrix.conformance(QLoraConfig(r=4, lora_alpha=1), not_applicable=EXCUSED)


def gpt_oss() -> nn.Module:
    return mixture("gpt_oss")


@pytest.mark.slow
@pytest.mark.nightly
def test_conformance_in_mxfp4() -> None:
    """On models whose layers have multiples of 32 inputs."""
    config = QLoraConfig(r=4, lora_alpha=1, quant_type="mxfp4")
    checks = [check for check in CHECKS if check != COMPILE]
    check_method(config, families=[llama, gpt_oss], checks=checks, not_applicable=EXCUSED)
