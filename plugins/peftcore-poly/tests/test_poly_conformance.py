"""The method passes the conformance suite."""

from peftcore_poly import PolyConfig
from support import matrix

from peftcore.plugin import PEFT_READS, PEFT_WRITES

TASKS = "PEFT needs task_ids in every call; compared in the plugin's tests"


def test_conformance() -> None:
    """With one task, which calls need not name."""
    excused = {PEFT_READS: TASKS, PEFT_WRITES: TASKS}
    matrix.conformance(PolyConfig(r=4), not_applicable=excused, compile_backend="eager")
