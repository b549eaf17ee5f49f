"""Soft prompts and prefixes in generation: every step is compared with one full forward."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import tiny
from support.prompted import (
    DECODERS,
    KINDS,
    N,
    applied,
    check_steps,
    close,
    falcon,
    generate,
    logits,
    mamba,
    mpt,
    xlstm,
)
from torch import nn

from peftcore.plugin import PeftcoreError, cache_argument, cached_tokens

pytestmark = pytest.mark.usefixtures("toys")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", DECODERS.values(), ids=DECODERS)
def test_generate(make: Callable[[], nn.Module], kind: str) -> None:
    model = applied(make(), kind)
    outs = [generate(model, tiny.TOKENS, use_cache=use_cache) for use_cache in (True, False)]
    for out in outs:
        check_steps(model, out, tiny.TOKENS.shape[1])
    assert torch.equal(outs[0].sequences, outs[1].sequences)


def test_generate_with_a_cache_that_counts_in_an_attribute() -> None:
    model = applied(xlstm(), "soft")
    outs = [generate(model, tiny.TOKENS, use_cache=use_cache) for use_cache in (True, False)]
    for out in outs:
        check_steps(model, out, tiny.TOKENS.shape[1])
    assert torch.equal(outs[0].sequences, outs[1].sequences)


def test_a_cache_that_does_not_count_is_refused() -> None:
    model = applied(xlstm(), "soft")
    with pytest.raises(PeftcoreError, match=r"but SimpleNamespace has no get_seq_length\(\). Pass use_cache=False"):
        model.backbone(tiny.TOKENS, **{cache_argument(model.backbone): SimpleNamespace()})


@pytest.mark.parametrize(
    ("make", "kind"), [*((make, kind) for make in DECODERS.values() for kind in KINDS), (mpt, "soft"), (mamba, "soft")]
)
def test_generate_with_rows_of_different_length(make: Callable[[], nn.Module], kind: str) -> None:
    """A row that is padded on the left gives the logits it gives alone."""
    model = applied(make(), kind)
    short = tiny.TOKENS[1:, :4]
    batch = torch.cat([tiny.TOKENS[:1], torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1)])
    mask = torch.ones_like(batch)
    mask[1, :3] = 0
    for use_cache in (True, False):
        out = generate(model, batch, mask, use_cache=use_cache)
        for row, alone in ((0, tiny.TOKENS[:1]), (1, short)):
            wanted = generate(model, alone, use_cache=use_cache)
            close(torch.stack(out.logits, 1)[row], torch.stack(wanted.logits, 1)[0], atol=1e-4)
        check_steps(model, out, batch.shape[1], mask)


@pytest.mark.parametrize("kinds", [("prefix", "prefix"), ("soft", "prefix"), ("prefix", "soft")], ids="-".join)
def test_generate_with_two(kinds: tuple[str, str]) -> None:
    model = applied(applied(tiny.llama(), kinds[0]), kinds[1], "second", seed=2)
    mask = torch.ones_like(tiny.TOKENS)
    mask[1, :2] = 0
    outs = [generate(model, tiny.TOKENS, mask, use_cache=use_cache) for use_cache in (True, False)]
    for out in outs:
        check_steps(model, out, tiny.TOKENS.shape[1], mask)
    assert torch.equal(outs[0].sequences, outs[1].sequences)


@pytest.mark.parametrize("heads", [{}, {"multi_query": False}, {"new_decoder_architecture": True, "num_kv_heads": 2}])
def test_falcon_s_heads(heads: dict[str, Any]) -> None:
    model = applied(falcon(**heads), "prefix")
    out = generate(model, tiny.TOKENS)
    check_steps(model, out, tiny.TOKENS.shape[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_beam_search(make: Callable[[], nn.Module], kind: str) -> None:
    model = applied(make(), kind)
    settings = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    cached, plain = (generate(model, tiny.TOKENS, use_cache=use_cache, **settings) for use_cache in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    close(cached.sequences_scores, plain.sequences_scores, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_of_one_s_own(kind: str) -> None:
    """Prefill, then token after token with the cache that the model gave; the mask covers the caller's tokens."""
    model = applied(tiny.llama(), kind)
    name = cache_argument(model)
    for padded in (0, 2):
        tokens, mask = tiny.TOKENS, torch.ones_like(tiny.TOKENS)
        mask[0, :padded] = 0
        wanted = logits(model, tokens, mask)
        with torch.no_grad():
            out = model(tokens[:, :4], mask[:, :4], use_cache=True)
            steps = [out.logits]
            for i in range(4, tokens.shape[1]):
                out = model(tokens[:, i : i + 1], mask[:, : i + 1], **{name: out[name]})
                steps.append(out.logits)
        close(torch.cat(steps, dim=1)[mask == 1], wanted[mask == 1])


@pytest.mark.parametrize("kind", KINDS)
def test_assisted_by_its_own_first_layer(kind: str) -> None:
    model = applied(tiny.llama(), kind)
    fields = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    alone = model.generate(tiny.TOKENS[:1], **fields)
    assert torch.equal(model.generate(tiny.TOKENS[:1], assistant_early_exit=1, **fields), alone)


@pytest.mark.parametrize("prefixes", [1, 2])
def test_prefixes_are_none_of_the_tokens_that_a_cache_has_read(prefixes: int) -> None:
    model = tiny.llama()
    for number in range(prefixes):
        applied(model, "prefix", f"prefix {number}")
    name = cache_argument(model)
    cache, tokens = model(tiny.TOKENS, use_cache=True)[name], tiny.TOKENS.shape[1]
    assert (cache.get_seq_length(), cached_tokens(cache)) == (prefixes * N + tokens, tokens)
    assert cached_tokens(model(tiny.TOKENS[:, :2], **{name: cache})[name]) == tokens + 2


def test_a_prefix_asks_for_no_cache() -> None:
    model = applied(tiny.llama(), "prefix")
    name = cache_argument(model)
    assert name not in model(tiny.TOKENS, use_cache=False)
    assert model(tiny.TOKENS)[name].get_seq_length() == N + tiny.TOKENS.shape[1]


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_generation(kind: str) -> None:
    """A compiled forward with a cache, at prefill and at each step; nothing falls back to Python."""
    model = applied(tiny.llama(), kind)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    wanted, name = logits(model, tiny.TOKENS), cache_argument(model)
    with torch.no_grad():
        out = compiled(tiny.TOKENS[:, :5], use_cache=True)
        last = compiled(tiny.TOKENS[:, 5:], **{name: out[name]})
    close(torch.cat([out.logits, last.logits], dim=1), wanted)
    torch._dynamo.reset()
