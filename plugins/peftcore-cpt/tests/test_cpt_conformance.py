"""The method passes the conformance suite."""

from peftcore_cpt import CptConfig
from support import matrix

from peftcore.plugin import IDENTITY, MERGE

NO_DECODER = "its loss is for decoders, as in PEFT"
EXCUSED = {
    IDENTITY: "vectors before the input change the output, whatever their values",
    MERGE: "a prompt is not a change of a weight",
    "T5": NO_DECODER,
    "BERT": NO_DECODER,
    "ViT": NO_DECODER,
}


def test_conformance() -> None:
    config = CptConfig(cpt_token_ids=[5, 6, 7, 8], cpt_tokens_type_mask=[1, 2, 3, 4], opt_projection_epsilon=4.0)
    matrix.conformance(config, not_applicable=EXCUSED)
