"""The method passes the conformance suite."""

from peftcore_adaption_prompt import AdaptionPromptConfig
from support import matrix

from peftcore.plugin import MERGE

OTHER = "its attention is not supported, as in PEFT"
EXCUSED = {
    MERGE: "prompts in attention are not a change of a weight",
    "T5": OTHER,
    "BERT": OTHER,
    "ViT": OTHER,
    "Qwen3-MoE": OTHER,
}


def test_conformance() -> None:
    matrix.conformance(AdaptionPromptConfig(adapter_len=4), not_applicable=EXCUSED, compile_backend="eager")
