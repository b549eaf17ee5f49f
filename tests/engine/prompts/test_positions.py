"""Positions that begin elsewhere, or that a module around the decoder makes: each step is one forward of all so far."""

from __future__ import annotations

import pytest
import torch
import transformers
from census import instances
from census.prompts import generated
from support import tiny
from support.releases import BEFORE_5_24
from torch import Tensor, nn

import peftcore
from peftcore.engine import adapter_parameters
from peftcore.engine.prompts.backbone import first_position
from peftcore.testing import disturb

METHODS = ("prompt-tuning", "prefix-tuning")
MASK = torch.ones_like(tiny.TOKENS)


def applied(model: nn.Module, method: str) -> nn.Module:
    peftcore.apply(model, method, num_virtual_tokens=3)
    disturb(model, "default", 3)
    return model


def logits(model: nn.Module, tokens: Tensor, **kwargs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, **kwargs).logits


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("Exaone4_5_ForConditionalGeneration", "prefix-tuning"),  # outside, positions are of the cache's length
        ("Kosmos2_5ForConditionalGeneration", "prefix-tuning"),  # they begin behind padding's
        ("MossTranscribeDiarizeForConditionalGeneration", "prompt-tuning"),  # the cache is one of **kwargs
        ("T5GemmaForConditionalGeneration", "prefix-tuning"),  # the decoder's config tells of no encoder
        pytest.param(  # the last layers take keys and values of earlier ones
            "Gemma3nForCausalLM",
            "prefix-tuning",
            marks=pytest.mark.skipif(BEFORE_5_24, reason="refused: its cache has no layers for them"),
        ),
        ("T5Gemma2ForConditionalGeneration", "prefix-tuning"),
    ],
)
def test_steps(name: str, method: str) -> None:
    model = applied(instances.build(name), method)
    out = generated(model, {"input_ids": tiny.TOKENS, "attention_mask": MASK})
    whole = {"input_ids": out.sequences, "attention_mask": torch.ones_like(out.sequences)}
    if model.config.is_encoder_decoder:
        whole = {"input_ids": tiny.TOKENS, "attention_mask": MASK, "decoder_input_ids": out.sequences}
    with torch.no_grad():
        wanted = model(**whole).logits[:, -1 - len(out.logits) : -1]
    torch.testing.assert_close(torch.stack(out.logits, dim=1), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_decoder_that_counts_from_behind_padding_s_place(method: str) -> None:
    """With a mask, without one, and with RoBERTa's own numbers: the same."""
    from transformers import RobertaConfig, RobertaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = RobertaForCausalLM(RobertaConfig(vocab_size=96, pad_token_id=1, is_decoder=True, **sizes)).eval()
    assert first_position(model.roberta) == 2
    applied(model, method)
    wanted = logits(model, tiny.TOKENS)
    torch.testing.assert_close(logits(model, tiny.TOKENS, attention_mask=MASK), wanted)
    own = torch.arange(2, 2 + tiny.TOKENS.shape[1]).expand(2, -1)
    torch.testing.assert_close(logits(model, tiny.TOKENS, position_ids=own), wanted)


def test_a_cache_that_the_model_copies() -> None:
    """Dory runs some layers again, each time with a copy of their cache: gradients go through all of them."""
    if not hasattr(transformers, "DoryForCausalLM"):
        pytest.skip("this release of transformers has no Dory")
    model = applied(instances.build("DoryForCausalLM"), "prefix-tuning")
    with torch.no_grad():
        wanted = model(input_ids=tiny.TOKENS).logits
    found = model(input_ids=tiny.TOKENS).logits
    torch.testing.assert_close(found, wanted)
    found[0, 0, 0].backward()
    (prefix,) = dict(adapter_parameters(model, "default")).values()
    with torch.no_grad():
        step = 1e-2 * prefix.grad
        prefix += step
        ahead = model(input_ids=tiny.TOKENS).logits[0, 0, 0]
        prefix -= 2 * step
        behind = model(input_ids=tiny.TOKENS).logits[0, 0, 0]
    torch.testing.assert_close(ahead - behind, 2 * (step * prefix.grad).sum(), rtol=1e-2, atol=1e-5)


def test_every_stream_of_states_is_cut() -> None:
    """ProphetNet's decoder gives one state for each token and each n of its n-grams."""
    model = instances.build("ProphetNetForCausalLM")
    base = instances.build("ProphetNetForCausalLM")
    applied(model, "prompt-tuning")
    (vectors,) = dict(adapter_parameters(model, "default")).values()
    with torch.no_grad():
        embedded = base.get_input_embeddings()(tiny.TOKENS)
        whole = base(inputs_embeds=torch.cat([vectors.expand(2, -1, -1), embedded], dim=1))
        found = model(input_ids=tiny.TOKENS)
    torch.testing.assert_close(found.logits, whole.logits[:, 3:])
    torch.testing.assert_close(found.logits_ngram, whole.logits_ngram[:, :, 3:])


@pytest.mark.parametrize("method", METHODS)
def test_a_cache_under_the_name_that_it_had(method: str) -> None:
    """A bare backbone takes `past_key_values` where it says `cache`, and the other way round in other releases."""
    from transformers import DynamicCache

    model = applied(instances.build("LlamaModel"), method)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        first = model(input_ids=tiny.TOKENS[:, :4], past_key_values=cache, use_cache=True)[0]
        last = model(input_ids=tiny.TOKENS[:, 4:], past_key_values=cache, use_cache=True)[0]
        whole = model(input_ids=tiny.TOKENS)[0]
    torch.testing.assert_close(torch.cat([first, last], dim=1), whole, rtol=0, atol=1e-4)
