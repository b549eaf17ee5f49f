"""Trainable tokens pass the conformance suite, on each family of models that have tokens."""

import torch
from peftcore_trainable_tokens import TrainableTokensConfig
from support import matrix

from peftcore.plugin import IDENTITY

TOKENS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(3)).flatten()  # those of the suite
APART = "may differ: rows of a tied head are a product of their own, which some processors round apart"


def test_conformance() -> None:
    excused = {
        "ViT": "an image has no tokens",
        **{f"{family}: {IDENTITY}": APART for family in ("GPT-2", "T5", "Gemma")},
    }
    config = TrainableTokensConfig(token_indices=[*dict.fromkeys(TOKENS[:6].tolist()), 2])
    matrix.conformance(config, not_applicable=excused)
