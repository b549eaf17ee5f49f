"""LoRA passes the conformance suite, on each kind of model."""

import pytest
from peftcore_lora import LoraConfig

from peftcore.testing import check_method


def test_llama() -> None:
    check_method(LoraConfig(r=4, lora_alpha=8))
