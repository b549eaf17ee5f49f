"""The method passes the conformance suite."""

from peftcore_alora import AloraConfig
from support import matrix
from torch import nn

from peftcore.plugin import MERGE
from peftcore.testing.families import tokens

EXCUSED = {
    MERGE: "it is active only after an invocation",
    **dict.fromkeys(("T5", "BERT", "ViT"), "it is for decoders, as in PEFT"),
}


def test_conformance() -> None:
    second = int(tokens(nn.Module(), 1)["input_ids"][0, 1])
    config = AloraConfig(r=4, alora_invocation_tokens=[second])
    matrix.conformance(config, not_applicable=EXCUSED, compile_backend="eager")
