"""What a mean over all tokens of a call makes of padding and caches is said, once each."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from support import tiny

import peftcore
from peftcore.plugin import disturb

MASK = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
GREEDY: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}


def adapted(make: Any = tiny.llama) -> Any:
    model = peftcore.apply(make(), "lily", r=4)
    disturb(model, "default", seed=1, std=0.5)
    return model


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.t5])
def test_padding_is_said_once(make: Any) -> None:
    model = adapted(make)
    call = {"input_ids": tiny.TOKENS, "attention_mask": MASK}
    if model.config.is_encoder_decoder:
        call["decoder_input_ids"] = tiny.TOKENS
    with torch.no_grad():
        with pytest.warns(UserWarning, match="Lily mixes .* padding included, .* Use rows of one length"):
            model(**call)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**call)


def test_padding_changes_a_row_as_is_said() -> None:
    model = adapted()
    with torch.no_grad(), pytest.warns(UserWarning, match="padding changes the result"):
        padded = model(input_ids=tiny.TOKENS, attention_mask=MASK).logits[1:, 2:]
        alone = model(input_ids=tiny.TOKENS[1:, 2:]).logits
    assert (padded - alone).abs().max() > 1e-3


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.t5])
def test_a_cache_is_said_once(make: Any) -> None:
    model = adapted(make)
    with pytest.warns(UserWarning, match="Lily mixes .* without the tokens in the cache.*use_cache=False"):
        model.generate(tiny.TOKENS, **GREEDY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(tiny.TOKENS, **GREEDY)


def test_without_either_nothing_is_said() -> None:
    model = adapted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=tiny.TOKENS, attention_mask=torch.ones_like(tiny.TOKENS), use_cache=True)
        model.generate(tiny.TOKENS, **GREEDY, use_cache=False)
