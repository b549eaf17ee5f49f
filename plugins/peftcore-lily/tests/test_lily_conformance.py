"""The method passes the conformance suite."""

from peftcore_lily import LilyConfig
from support import matrix

MEAN = "its factors are mixed by a mean over all tokens of the call, as in PEFT"


def test_conformance() -> None:
    excuses = {
        "merge equals forward, unmerge is bit exact": "the tokens determine how its factors are mixed",
        "gradients of four accumulated batches equal those of one, with the method's loss term once": MEAN,
        "generate, with and without cache, equals one full forward": MEAN,
        "generate for rows of different lengths, with and without cache, equals each row alone": MEAN,
    }
    matrix.conformance(LilyConfig(r=4), compile_backend="eager", not_applicable=excuses)
