"""QLoRA passes the conformance suite, on each family of models, which it prepares."""

import pytest
from peftcore_qlora import QLoraConfig
from support import matrix
from support.mixtures import mixture
from torch import nn

from peftcore.plugin import MERGE
from peftcore.testing import CHECKS, COMPILE, FAMILIES, check_method

EXCUSED = {MERGE: "merging into 4 bits would lose the adapter and is refused; it merges into 16 bits"}


def test_conformance() -> None:
    # With a larger alpha some layers lose just less than the tenth from which merge refuses.
    matrix.conformance(QLoraConfig(r=4, lora_alpha=1), not_applicable=EXCUSED)


def gpt_oss() -> nn.Module:
    return mixture("gpt_oss")


@pytest.mark.nightly
@pytest.mark.parametrize("quant_type", ["mxfp4", "nvfp4", "affine4"])
def test_conformance_in_each_format(quant_type: str) -> None:
    """Every family passes in the formats that `test_conformance` does not run, which runs NF4."""
    options = {"blocksize": 32} if quant_type == "affine4" else {}
    config = QLoraConfig(r=4, lora_alpha=1, quant_type=quant_type, **options)
    checks = [check for check in CHECKS if check != COMPILE]
    check_method(config, families=[*FAMILIES, gpt_oss], checks=checks, not_applicable=EXCUSED)
