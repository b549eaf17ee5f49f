"""Prompts and prefixes of encoders, encoder-decoders and classifiers, and what is given back of their output."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import tiny
from support.prompted import ENCODER_DECODERS, KINDS, applied, bart, close, generate, logits
from torch import nn

import peftcore
from peftcore import engine

pytestmark = pytest.mark.usefixtures("toys")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", ENCODER_DECODERS.values(), ids=ENCODER_DECODERS)
def test_encoder_decoder(make: Callable[[], nn.Module], kind: str) -> None:
    model, base = applied(make(), kind), make()
    start = torch.full((2, 1), model.config.decoder_start_token_id)
    decoder = torch.cat([start, tiny.TOKENS[:, :4]], dim=1)
    plain = logits(model, tiny.TOKENS, decoder_input_ids=decoder)
    close(logits(model, tiny.TOKENS, torch.ones_like(tiny.TOKENS), decoder_input_ids=decoder), plain)
    assert (plain - logits(base, tiny.TOKENS, decoder_input_ids=decoder)).abs().max() > 1e-3
    # A row that is padded, with cache and without, against one forward.
    mask = torch.ones_like(tiny.TOKENS)
    mask[1, 5:] = 0
    for use_cache in (True, False):
        out = generate(model, tiny.TOKENS, mask, use_cache=use_cache)
        wanted = logits(model, tiny.TOKENS, mask, decoder_input_ids=out.sequences)[:, :-1]
        close(torch.stack(out.logits, 1), wanted, atol=1e-4)
        alone = generate(model, tiny.TOKENS[1:, :5], use_cache=use_cache)
        if make is not bart or kind == "prefix":
            close(torch.stack(out.logits, 1)[1], torch.stack(alone.logits, 1)[0], atol=1e-4)
    beams = [generate(model, tiny.TOKENS, mask, use_cache=c, num_beams=2).sequences for c in (True, False)]
    assert torch.equal(*beams)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [tiny.bert_classifier, tiny.roberta_classifier])
def test_encoder(make: Callable[[], nn.Module], kind: str) -> None:
    """Padding on the right changes nothing, and token types are taken."""
    model = applied(make(), kind)
    mask = torch.ones_like(tiny.TOKENS)
    mask[1, 5:] = 0
    tokens = tiny.TOKENS.masked_fill(mask == 0, model.config.pad_token_id)
    plain = logits(model, tokens, mask)
    close(plain[1:], logits(model, tokens[1:, :5]))
    close(logits(model, tokens, mask, token_type_ids=torch.zeros_like(tokens)), plain)
    assert (plain - logits(make(), tokens, mask)).abs().max() > 1e-3


def test_outputs_are_those_of_the_caller_s_tokens() -> None:
    """Hidden states of every layer, and heads over tokens, are cut; a pooled head sees the prompt."""
    from transformers import BertForTokenClassification

    model = applied(tiny.llama(), "soft")
    out = model(tiny.TOKENS, output_hidden_states=True)
    assert {states.shape[1] for states in out.hidden_states} == {tiny.TOKENS.shape[1]}
    tagger = applied(BertForTokenClassification(tiny.bert_classifier().config).eval(), "soft")
    assert logits(tagger, tiny.TOKENS).shape[:2] == tiny.TOKENS.shape
    assert tagger(tiny.TOKENS, labels=torch.zeros_like(tiny.TOKENS)).loss.isfinite()
    pooled = applied(tiny.bert_classifier(), "soft")
    assert engine.applied(pooled, "default").paths[0] == ""


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_over_the_caller_s_tokens(kind: str) -> None:
    model = applied(tiny.llama(), kind)
    out = model(tiny.TOKENS, labels=tiny.TOKENS)
    wanted = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tiny.TOKENS[:, 1:].flatten())
    close(out.loss, wanted, atol=1e-6)


def test_a_decoder_s_classifier_pools_by_its_tokens() -> None:
    from transformers import GPT2ForSequenceClassification

    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(tiny.gpt2().config).eval()
    for kind in KINDS:
        applied(model, kind, adapter=kind)
        peftcore.activate(model, kind)
        padded = torch.cat([tiny.TOKENS, torch.zeros(2, 3, dtype=torch.long)], dim=1)
        close(logits(model, padded, (padded != 0).long()), logits(model, tiny.TOKENS))
