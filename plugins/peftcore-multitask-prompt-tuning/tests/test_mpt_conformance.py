"""The method passes the conformance suite."""

from peftcore_multitask_prompt_tuning import MultitaskPromptTuningConfig
from support import matrix

from peftcore.plugin import IDENTITY, MERGE, PEFT_READS, PEFT_WRITES

TASKS = "PEFT needs task_ids in every call; compared in the plugin's tests"
EXCUSED = {
    IDENTITY: "vectors before the input change the output, whatever their values",
    MERGE: "a prompt is not a change of a weight",
    PEFT_READS: TASKS,
    PEFT_WRITES: TASKS,
    "ViT": "an image has no tokens that vectors could precede",
}


def test_conformance() -> None:
    """With one task, which calls need not name."""
    matrix.conformance(MultitaskPromptTuningConfig(num_virtual_tokens=4), not_applicable=EXCUSED)
