"""QLoRA passes the conformance suite, on each family of models, which it prepares."""

import matrix
from peftcore_qlora import QLoraConfig

from peftcore.plugin import MERGE


def test_conformance() -> None:
    excused = {MERGE: "quantizing again loses the adapter; merge measures that and refuses"}
    matrix.conformance(QLoraConfig(r=4, lora_alpha=8), not_applicable=excused)
