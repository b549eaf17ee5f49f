"""What prompts and prefixes cannot serve is refused, with the reason, from what the model is or gave."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from census import instances
from support import tiny

import peftcore
from peftcore import PeftcoreError
from peftcore.model import example_inputs
from peftcore.plugin import cache_argument


def refused(name: str, method: str, message: str, **inputs: Any) -> None:
    """At apply, or at the first forward."""
    model = instances.build(name)
    with pytest.raises(PeftcoreError, match=message):
        peftcore.apply(model, method, num_virtual_tokens=3)
        model(**(inputs or example_inputs(model)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "Gemma4ForCausalLM",
            r"needs heads of equal width in all layers, but .* has widths \[8, 16\]. Use a soft prompt",
        ),
        (
            "MiMoV2FlashModel",
            r"2 heads of width 8, 16 features in all, but .* has output sizes \{'k_proj': 32, 'v_proj': 32\}",
        ),
        ("BambaModel", r"layers \[0\] of BambaModel cache a recurrent or compressed state|a cache in 1: \[1\]"),
        ("HrmTextModel", r"keys and values for 16 layers, but HrmTextModel has attention with a cache in 2: \[0, 1\]"),
        ("ProphetNetForCausalLM", "reads one token at a time if its cache is not empty, but PrefixKV fills the cache"),
        ("ParakeetForRNNT", "is unknown. Provide it with a plugin's"),
        ("SpeechT5ForTextToSpeech", "a prompt needs input tokens, but the model was called without them"),
        ("MusicgenForConditionalGeneration", "reads several rows of codes per sequence"),
        ("SpeechT5ForSpeechToText", "a prompt needs input tokens, but the model was called without them"),
    ],
)
def test_a_prefix(name: str, message: str) -> None:
    refused(name, "prefix-tuning", message)


def test_a_prefix_before_images_that_attend_in_both_directions() -> None:
    model = instances.build("Gemma3ForConditionalGeneration")
    peftcore.apply(model, "prefix-tuning", num_virtual_tokens=3)
    tokens = {"input_ids": tiny.TOKENS, "token_type_ids": torch.zeros_like(tiny.TOKENS)}
    assert model(**tokens).logits.isfinite().all()
    with pytest.raises(
        PeftcoreError, match=r"only uses bidirectional attention for images while the cache is empty.*Use a soft prompt"
    ):
        model(**tokens, pixel_values=torch.zeros(2, 3, 8, 8))


def test_a_prefix_and_a_mask_of_more_than_the_tokens_where_nothing_is_kept() -> None:
    model = instances.build("RobertaForCausalLM")
    assert not model.config.is_decoder
    peftcore.apply(model, "prefix-tuning", num_virtual_tokens=3)
    with pytest.raises(
        PeftcoreError,
        match=r"called with 1 tokens and a mask of 7\. To generate, set "
        r"is_decoder=True in",
    ):
        model(input_ids=tiny.TOKENS[:, -1:], attention_mask=torch.ones_like(tiny.TOKENS))


def test_a_soft_prompt_and_a_state_of_another_name() -> None:
    """Reformer's buckets; without them every step reads the prompt anew."""
    model = instances.build("ReformerModelWithLMHead")
    peftcore.apply(model, "prompt-tuning", num_virtual_tokens=3)
    tokens = {"input_ids": tiny.TOKENS, "attention_mask": torch.ones_like(tiny.TOKENS), "max_new_tokens": 2}
    with pytest.raises(PeftcoreError, match=r"stores earlier tokens in '.*Generate with use_cache=False"):
        model.generate(**tokens)
    assert model.generate(**tokens, use_cache=False).shape == (len(tiny.TOKENS), tiny.TOKENS.shape[1] + 2)


def test_a_prefix_before_padding_that_is_counted() -> None:
    model = instances.build("RoFormerForMaskedLM")
    peftcore.apply(model, "prefix-tuning", num_virtual_tokens=3)
    mask = torch.ones_like(tiny.TOKENS)
    mask[1, :3] = 0
    with pytest.raises(PeftcoreError, match="includes padding in relative positions"):
        model(input_ids=tiny.TOKENS, attention_mask=mask)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "CohereAsrModel",
            r"a soft prompt needs tokens, but 'encoder' \(ParakeetEncoder\) takes input_features, atten",
        ),
        (
            "BlipModel",
            "cannot be removed from a BlipOutput, which has no last_hidden_state. Apply the adapter to the submodule",
        ),
        (
            "CpmAntModel",
            "CpmAntModel did not call its token embedding with all tokens, so the soft prompt had no effect",
        ),
        ("FunnelBaseModel", "the model returned 3 hidden states for 10 tokens, 3 of them a soft prompt's"),
        ("ViTModel", "SoftPrompt needs a token embedding, but ViTModel does not declare one"),
    ],
)
def test_a_soft_prompt(name: str, message: str) -> None:
    refused(name, "prompt-tuning", message)


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
def test_what_is_no_batch_of_tokens(method: str) -> None:
    refused(
        "LlamaModel",
        method,
        r"needs tokens of shape \[batch, length\], found a tensor of shape \[1, 2, 7\]",
        input_ids=tiny.TOKENS[None],
    )
    refused("LlamaModel", method, "called without them", attention_mask=torch.ones(2, 7))


def test_a_prefix_for_a_cache_of_another_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a config that counts layers of its cache apart: which layer's keys would be whose is not known."""
    from peftcore.engine.prompts import prefix

    model = instances.build("LlamaModel")
    longer = copy.deepcopy(model.config)
    longer.num_hidden_layers = 3
    monkeypatch.setattr(prefix, "_new_cache", lambda *_: transformers.DynamicCache(config=longer))
    with pytest.raises(PeftcoreError, match="caches keys and values of 3 layers but runs 2, so PrefixKV cannot"):
        peftcore.apply(model, "prefix-tuning")


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
def test_an_encoder_decoder_that_names_no_decoder(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.t5()
    monkeypatch.setattr(type(model), "get_decoder", lambda _: None)
    with pytest.raises(PeftcoreError, match=r"need an encoder and a decoder, but T5ForCond.* does not declare both"):
        peftcore.apply(model, method)


def test_a_cache_of_a_call_that_failed_is_refused() -> None:
    """The prefix is in it already, and would be put there again."""
    model = peftcore.apply(tiny.llama().eval(), "prefix_tuning", num_virtual_tokens=3)
    first, second = ({str(cache_argument(model)): transformers.DynamicCache(config=model.config)} for _ in range(2))
    with pytest.raises(IndexError):
        model(tiny.TOKENS + 1000, **first)
    with pytest.raises(PeftcoreError, match=r"raised an error after inserting the prefix.* Pass a new cache"):
        model(tiny.TOKENS, **first)
    wanted = model(tiny.TOKENS, **second).logits
    for _ in range(2):
        (emptied,) = first.values()
        emptied.reset()
        assert torch.equal(model(tiny.TOKENS, **first).logits, wanted)


# PyTorch 2.9 reads `grad` of an output where it goes on after a break of the graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
def test_examples_that_are_packed_into_a_row(method: str) -> None:
    """Only the first of them would get the prompt. Positions that the caller counts on, or with a mask, are allowed."""
    model = peftcore.apply(tiny.llama(), method, num_virtual_tokens=3)
    row = {"input_ids": torch.arange(5, 12)[None], "use_cache": False}
    for packed in ([0, 1, 2, 0, 1, 2, 3], [0, 0, 1, 2, 3, 4, 5]):
        with pytest.raises(PeftcoreError, match=r"^a row contains several packed examples.*padding_free=False"):
            model(**row, position_ids=torch.tensor([packed]))
    with pytest.raises(PeftcoreError, match=r"^a row contains several packed examples"):
        model(**row, cu_seq_lens_q=torch.tensor([0, 3, 7]))
    with pytest.raises((PeftcoreError, RuntimeError), match=r"^a row contains several packed examples"):
        torch.compile(model, backend="eager")(**row, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]))
    wanted = model(**row).logits
    torch.testing.assert_close(model(**row, cu_seq_lens_q=torch.tensor([0, 7])).logits, wanted)
    torch.testing.assert_close(model(**row, position_ids=torch.arange(7)[None]).logits, wanted)
    padded = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    assert (
        model(**row, position_ids=torch.tensor([[1, 1, 0, 1, 2, 3, 4]]), attention_mask=padded).logits.isfinite().all()
    )
