"""It passes the conformance suite."""

import matrix
from peftcore_multitask_prompt_tuning import MultitaskPromptTuningConfig

from peftcore.testing import check_method

NOT_APPLICABLE = {
    "identity at the start": "vectors before the input change the output, whatever their values",
    "merge equals forward, unmerge is bit exact": "a prompt is no change of a weight",
    "Hugging Face PEFT computes the same from the file": "PEFT asks for task_ids in every call; compared in its tests",
}


def test_conformance() -> None:
    """With one task, which calls need not name."""
    matrix.check(check_method(MultitaskPromptTuningConfig(num_virtual_tokens=4), not_applicable=NOT_APPLICABLE))
