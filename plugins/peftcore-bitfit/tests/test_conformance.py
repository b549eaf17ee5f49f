"""BitFit passes the conformance suite, on each kind of model."""

import matrix
import pytest
import tiny
from peftcore_bitfit import BitFitConfig

from peftcore.testing import check_method

MERGING = {"merge equals forward, unmerge is bit exact": "the base has no place for an added bias"}
ENCODERS = {
    "generate, with and without cache, equals one full forward",
    "generate for rows of different lengths, with and without cache, equals each row alone",
}
PEFT = "Hugging Face PEFT computes the same from the file"


@pytest.mark.parametrize("kind", list(tiny.MODELS))
def test_conformance(kind: str) -> None:
    bare = kind in ("llama", "t5")  # models without biases
    report = check_method(
        BitFitConfig(add_missing=bare),
        make_model=tiny.MODELS[kind],
        not_applicable=MERGING if bare else None,
        compile_backend="aot_eager" if kind == "gpt2" else "eager",
    )
    excused = {result.name for result in report.results if result.reason}
    assert excused == {PEFT, *(MERGING if bare else ()), *(ENCODERS if kind == "bert" else ())}
    if kind == "gpt2":
        matrix.check(report)
