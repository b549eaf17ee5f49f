"""The method passes the conformance suite."""

from peftcore_p_tuning import PTuningConfig
from support import matrix

from peftcore.plugin import IDENTITY, MERGE

EXCUSED = {
    IDENTITY: "vectors before the input change the output, whatever their values",
    MERGE: "a prompt is not a change of a weight",
    "ViT": "an image has no tokens that vectors could precede",
}


def test_conformance() -> None:
    matrix.conformance(PTuningConfig(num_virtual_tokens=4), not_applicable=EXCUSED)
