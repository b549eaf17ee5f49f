"""Beside Hugging Face PEFT, both ways and in generate; with caches, beams, checkpoints and offsets; errors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support import prompted, tiny
from support.against_peft import both_ways, quiet
from support.checkpointing import enable_checkpointing
from torch import Tensor, nn
from transformers import DynamicCache

import peftcore
from peftcore.plugin import cache_argument, disturb

FIELDS: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
TOKENS = torch.tensor([[5, 17, 3, 60, 41, 17, 3, 9], [8, 4, 17, 3, 2, 50, 63, 7], [8, 4, 77, 31, 2, 50, 63, 7]])
INVOCATION = [17, 3]
ACTS = torch.tensor([[0] * 5 + [1] * 3, [0] * 2 + [1] * 6, [0] * 8]).bool()  # of the last one in each row


def adapted(tokens: list[int] = INVOCATION, **fields: Any) -> nn.Module:
    model = peftcore.apply(tiny.llama(), "alora", alora_invocation_tokens=tokens, **{**FIELDS, **fields})
    return disturb(model, "default", seed=1) or model


def run(model: nn.Module, ids: Tensor, **call: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **call).logits


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_files(tmp_path: Path) -> None:
    fields = {**FIELDS, "alora_invocation_tokens": [17, 3]}
    model = peftcore.apply(tiny.llama(), "alora", **fields)
    both_ways(tiny.llama, tmp_path, model, peft.LoraConfig(task_type="CAUSAL_LM", **fields))


def test_it_acts_from_the_last_invocation_on(tmp_path: Path) -> None:
    """Before it a token is the base's, in a row without one all are. As in PEFT, generating from padded rows too."""
    model = adapted()
    actual, base = run(model, TOKENS), run(tiny.llama(), TOKENS)
    differs = (actual - base).abs().amax(-1) > 1e-4
    assert torch.equal(differs, ACTS)
    peftcore.save(model, tmp_path)
    peft_model = quiet(peft.PeftModel.from_pretrained, tiny.llama(), tmp_path).eval()
    close(actual, quiet(run, peft_model, TOKENS))
    padded, mask = nn.functional.pad(TOKENS, (3, 0)), nn.functional.pad(torch.ones_like(TOKENS), (3, 0))
    greedy: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5}
    expected = quiet(peft_model.generate, input_ids=padded, **greedy)
    assert torch.equal(model.generate(padded, **greedy), expected)
    assert not torch.equal(tiny.llama().generate(padded, **greedy), expected)


@pytest.mark.parametrize("cuts", [(4,), (6,), (1, 5), (2, 4)], ids=str)
def test_a_cache_goes_on(cuts: tuple[int, ...]) -> None:
    """In chunks, of which the last ones may have been generated; a copy of the cache knows it, a cropped one not."""
    model, cache = adapted(), DynamicCache()
    ids, expected = TOKENS[1:], run(adapted(), TOKENS[1:])
    parts = ids.tensor_split(cuts, dim=1)
    outputs = [run(model, part, **{cache_argument(model): cache}) for part in parts[:-1]]
    copied_cache = copy.deepcopy(cache)
    close(torch.cat([*outputs, run(model, parts[-1], **{cache_argument(model): cache})], 1), expected)
    close(run(model, parts[-1], **{cache_argument(model): copied_cache}), expected[:, -parts[-1].shape[1] :])
    cache.crop(2 - ids.shape[1])
    tokens = torch.tensor([[9, 9, 9], [9, 9, 9]])
    close(run(model, tokens, **{cache_argument(model): cache}), run(model, torch.cat([ids[:, :2], tokens], 1))[:, 2:])


def test_a_recurrence_goes_on() -> None:
    """Its cache does not say how many tokens it has read."""
    model = peftcore.apply(prompted.mamba(), "alora", alora_invocation_tokens=INVOCATION, target_modules=["in_proj"])
    disturb(model, "default", seed=1)
    ids, cache = TOKENS[1:], DynamicCache(config=model.config)
    actual = [run(model, part, **{cache_argument(model): cache}) for part in ids.split([5, 1, 1, 1], dim=1)]
    close(torch.cat(actual, 1), run(model, ids))


def test_a_cache_by_its_old_name() -> None:
    model, cache = adapted(), DynamicCache()
    quiet(run, model, TOKENS[1:, :6], past_key_values=cache)
    close(quiet(run, model, TOKENS[1:, 6:], past_key_values=cache), run(model, TOKENS[1:])[:, 6:])


@pytest.mark.parametrize("fields", [{"target_modules": ["down_proj"]}, {"layers_to_transform": [1]}], ids=str)
def test_layers_behind_those_that_fill_the_cache(fields: dict[str, Any]) -> None:
    model, cache = adapted(**fields), DynamicCache()
    actual = [run(model, part, **{cache_argument(model): cache}) for part in TOKENS[1:].split((5, 2, 1), dim=1)]
    close(torch.cat(actual, 1), run(model, TOKENS[1:]))


def test_an_invocation_across_two_calls_is_refused() -> None:
    """Its first tokens are in the cache as the base has them. The one of a later call takes the place of an earlier."""
    model, cache = adapted(), DynamicCache()
    run(model, TOKENS[1:2, :3], **{cache_argument(model): cache})
    with pytest.raises(peftcore.PeftcoreError, match="the invocation is split over two calls"):
        run(model, TOKENS[1:2, 3:], **{cache_argument(model): cache})
    queries: list[Tensor] = []
    cache = DynamicCache()
    handle = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda _m, _x, y: queries.append(y))
    run(model, TOKENS[:1, :4], **{cache_argument(model): cache})
    run(model, TOKENS[:1, 4:], **{cache_argument(model): cache})
    with peftcore.disabled(model):
        run(model, TOKENS[:1])
    handle.remove()
    acts = (torch.cat(queries[:2], 1) - queries[2]).abs().amax(-1) > 1e-4
    assert acts.int().tolist() == [[0, 1, 1, 1, 0, 1, 1, 1]]


def test_beams() -> None:
    """The rows of one text's beams change places; the cache changes nothing."""
    model = adapted()
    call: dict[str, Any] = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "min_new_tokens": 6}
    actual, expected = (model.generate(TOKENS, use_cache=cached, **call) for cached in (True, False))
    assert torch.equal(actual, expected)
    assert torch.equal(actual[:1], model.generate(TOKENS[:1], **call))


def test_checkpointed_layers_see_their_call() -> None:
    gradients = []
    for checkpointed in (False, True):
        model = adapted().train()
        if checkpointed:
            enable_checkpointing(model, {"use_reentrant": False})
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert any(gradient.abs().max() > 0 for gradient in gradients[0])


def test_offsets_say_it_instead() -> None:
    model, offsets = adapted(), torch.tensor([3, 6, 0])
    expected = run(model, TOKENS)
    embeddings = model.get_input_embeddings()(TOKENS)
    with pytest.raises(peftcore.PeftcoreError, match=r"the call has none\. Pass alora_offsets"):
        run(model, None, inputs_embeds=embeddings)  # type: ignore[arg-type]
    close(run(model, None, inputs_embeds=embeddings, alora_offsets=offsets), expected)  # type: ignore[arg-type]
    other_model = adapted([90])
    close(run(other_model, TOKENS, alora_offsets=offsets), expected)
    call: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    assert torch.equal(other_model.generate(TOKENS, alora_offsets=offsets, **call), model.generate(TOKENS, **call))


def test_a_cache_of_the_base_serves_it() -> None:
    model, cache = adapted(), DynamicCache()
    with peftcore.disabled(model):
        run(model, TOKENS[:2, :2], **{cache_argument(model): cache})
    unknown = copy.deepcopy(cache)
    close(run(model, TOKENS[:2, 2:], **{cache_argument(model): cache}), run(model, TOKENS[:2])[:, 2:])
    with pytest.raises(peftcore.PeftcoreError, match=r"may have invoked the adapter\. Pass alora_offsets"):
        run(model, TOKENS[:2, 4:], **{cache_argument(model): unknown})
    close(run(model, TOKENS[:2, 2:3], **{cache_argument(model): unknown}, alora_offsets=torch.tensor([0, 1]))[:1],
          run(tiny.llama(), TOKENS[:1, :3])[:, 2:])  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"alora_invocation_tokens must be the token ids .*, found \[\]"),
        ({"alora_invocation_tokens": [5, -1]}, r"found \[5, -1\]"),
        ({"alora_invocation_tokens": [5], "lora_bias": True}, "lora_bias=True is not supported with activated LoRA"),
        ({"alora_invocation_tokens": [5], "target_modules": ["embed_tokens"]}, "cannot adapt 'model.embed_tokens'"),
    ],
    ids=["none", "negative", "bias", "embedding"],
)
def test_what_it_does_not_know_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(peftcore.PeftcoreError, match=message):
        peftcore.apply(tiny.llama(), "alora", **fields)
    with pytest.raises(peftcore.PeftcoreError, match="for text decoders, as in PEFT, but BertForSeq"):
        peftcore.apply(tiny.bert_classifier(), "alora", alora_invocation_tokens=[5])


def test_it_does_not_merge() -> None:
    with pytest.raises(peftcore.PeftcoreError, match="merge"):
        peftcore.merge(adapted(), undo=True)


def test_texts_packed_into_a_row() -> None:
    """Each has its own invocation, also in a compiled graph; an invocation over two texts is none."""
    model, texts = adapted(), [TOKENS[0, :6], TOKENS[1], torch.tensor([9, 17]), torch.tensor([3, 8])]
    expected = torch.cat([run(model, text[None], use_cache=False)[0] for text in texts])
    places = torch.cat([torch.arange(len(text)) for text in texts])[None]
    row = {"ids": torch.cat(texts)[None], "position_ids": places, "use_cache": False}
    close(run(model, **row)[0], expected)
    close(run(torch.compile(model, backend="eager", fullgraph=True), **row)[0], expected)
    with pytest.raises(
        peftcore.PeftcoreError, match=r"a row contains several packed examples.*alora_offsets must have one number"
    ):
        run(model, **row, alora_offsets=torch.tensor([3]))


def test_padding_invokes_nothing() -> None:
    model, mask = adapted([0, 8]), torch.tensor([[0, 0, 1, 1, 1]])
    ids = torch.tensor([[0, 0, 8, 4, 17]])
    close(run(model, ids, attention_mask=mask)[:, 2:], run(model, ids[:, 2:]))
