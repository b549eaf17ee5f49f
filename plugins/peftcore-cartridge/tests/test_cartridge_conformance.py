"""The method passes the conformance suite."""

from peftcore_cartridge import CartridgeConfig
from support import matrix

from peftcore.plugin import IDENTITY, MERGE, PEFT_READS, PEFT_WRITES

EXCUSED = {
    IDENTITY: "keys and values in the cache change the output, whatever they are",
    MERGE: "a prefix is not a change of a weight",
    f"BERT: {PEFT_READS}": "PEFT has it for models with a cache",
    f"BERT: {PEFT_WRITES}": "PEFT has it for models with a cache",
    "ViT": "an image has no tokens that a prefix could precede",
}


def test_conformance() -> None:
    matrix.conformance(CartridgeConfig(num_virtual_tokens=4), not_applicable=EXCUSED)
