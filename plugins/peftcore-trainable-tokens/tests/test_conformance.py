"""Trainable tokens pass the conformance suite, on each kind of model."""

import matrix
import pytest
import tiny
import torch
from peftcore_trainable_tokens import TrainableTokensConfig

from peftcore.testing import check_method

TOKENS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(3)).flatten()  # those of the suite
APART = {"identity at the start": "rows of a tied head are a product of their own, which is rounded apart"}


@pytest.mark.parametrize("kind", list(tiny.MODELS))
def test_conformance(kind: str) -> None:
    report = check_method(
        TrainableTokensConfig(token_indices=[*dict.fromkeys(TOKENS[:6].tolist()), 2]),
        make_model=tiny.MODELS[kind],
        not_applicable=APART if kind in ("gpt2", "t5") else None,
        compile_backend="aot_eager" if kind == "llama" else "eager",
    )
    if kind == "llama":
        matrix.check(report)
