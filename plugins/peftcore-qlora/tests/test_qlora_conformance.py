"""QLoRA passes the conformance suite, on each family of models, which it prepares."""

import matrix
from peftcore_qlora import QLoraConfig

from peftcore.plugin import MERGE


def test_conformance() -> None:
    excused = {MERGE: "quantizing again loses the adapter; merge measures that and refuses"}
    # With a larger alpha some layers lose just less than the tenth from which merge refuses.
    matrix.conformance(QLoraConfig(r=4, lora_alpha=1), not_applicable=excused)
