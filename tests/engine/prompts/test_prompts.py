"""Soft prompts and prefixes, with toy methods: what they are, several at once, copies, training."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable

import pytest
import torch
from support import tiny
from support.checkpointing import enable_checkpointing
from support.prompted import DECODERS, KINDS, applied, bloom, by_hand, check_steps, close, generate, logits
from torch import nn
from transformers.cache_utils import CacheLayerMixin

import peftcore
from peftcore.engine import adapter_parameters
from peftcore.engine.prompts.backbone import Backbone, cache_argument
from peftcore.engine.prompts.prefix import PrefixLayer

pytestmark = pytest.mark.usefixtures("toys")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", DECODERS.values(), ids=DECODERS)
def test_definition(make: Callable[[], nn.Module], kind: str) -> None:
    model = applied(make(), kind)
    wanted = by_hand(model, kind, tiny.TOKENS)
    assert (wanted - logits(make(), tiny.TOKENS)).abs().max() > 1e-3
    ones = torch.ones_like(tiny.TOKENS)
    close(logits(model, tiny.TOKENS), wanted)
    close(logits(model, tiny.TOKENS, ones), wanted)
    close(logits(model, tiny.TOKENS, ones.bool()), wanted)
    close(logits(model, inputs_embeds=model.get_input_embeddings()(tiny.TOKENS)), wanted)
    if make is not bloom:
        positions = torch.arange(tiny.TOKENS.shape[1]).expand(2, -1)
        close(logits(model, tiny.TOKENS, position_ids=positions), wanted)
    with torch.no_grad():
        close(model(tiny.TOKENS, return_dict=False)[0], wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_mask_stays_missing(kind: str) -> None:
    model, seen = applied(tiny.llama(), kind), []
    own = Backbone._make_room
    around = model.model.peftcore["default"]
    around._make_room = lambda call, past: (own(around, call, past), seen.append(call))[0]
    logits(model, tiny.TOKENS)
    assert seen[0].get("attention_mask") is None and seen[0].get("position_ids") is None


@pytest.mark.parametrize("order", [("soft", "soft"), ("prefix", "prefix"), ("soft", "prefix"), ("prefix", "soft")])
def test_several_at_once(order: tuple[str, str]) -> None:
    """Soft prompts stand in the order of activation, prefixes in front of them."""
    model = tiny.llama()
    for i, kind in enumerate(order):
        applied(model, kind, adapter=f"{i}", seed=i)
    found = logits(model, tiny.TOKENS)
    close(logits(model, tiny.TOKENS, torch.ones_like(tiny.TOKENS)), found)
    for use_cache in (True, False):
        check_steps(model, generate(model, tiny.TOKENS, use_cache=use_cache), tiny.TOKENS.shape[1])
    # By hand: one soft prompt of all rows, one prefix of all keys, in the base.
    from transformers import DynamicCache

    vectors = [next(iter(dict(adapter_parameters(model, f"{i}")).values())) for i in range(2)]
    soft = [v for v, kind in zip(vectors, order, strict=True) if kind == "soft"]
    prefixes = [v for v, kind in zip(vectors, order, strict=True) if kind == "prefix"]
    with peftcore.disabled(model), torch.no_grad():
        cache = DynamicCache(config=model.config)
        if prefixes:
            for layer, (key, value) in enumerate(torch.cat(prefixes[::-1], dim=3)):
                cache.update(key.expand(2, -1, -1, -1), value.expand(2, -1, -1, -1), layer)
        rows = torch.cat([v.expand(2, -1, -1) for v in soft] + [model.get_input_embeddings()(tiny.TOKENS)], dim=1)
        wanted = model(inputs_embeds=rows, **{cache_argument(model): cache}).logits[:, -tiny.TOKENS.shape[1] :]
    close(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [*tiny.MODELS.values(), tiny.roberta_classifier])
def test_switching_disabling_and_removing(make: Callable[[], nn.Module], kind: str) -> None:
    base, model = make(), make()
    alone = [tiny.logits(applied(make(), kind, seed=seed)) for seed in (1, 2)]
    applied(model, kind, "a", seed=1)
    peftcore.activate(model, [])
    applied(model, kind, "b", seed=2)
    for name, wanted in (("b", alone[1]), ("a", alone[0]), ("b", alone[1])):
        peftcore.activate(model, name)
        assert torch.equal(tiny.logits(model), wanted)
    with peftcore.disabled(model):
        assert torch.equal(tiny.logits(model), tiny.logits(base))
    peftcore.remove(model, "a")
    assert torch.equal(tiny.logits(model), alone[1])
    peftcore.remove(model, "b")
    assert torch.equal(tiny.logits(model), tiny.logits(base))
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [tiny.llama, tiny.t5])
def test_copies_are_independent(make: Callable[[], nn.Module], kind: str) -> None:
    """The copy's layers, which checkpointing sends to the adapter, see the copy's adapter."""
    model = applied(make(), kind).train()
    wanted = tiny.logits(model.eval())
    twin = copy.deepcopy(model)
    assert torch.equal(tiny.logits(twin), wanted)
    own = next(parameter for _, parameter in adapter_parameters(twin, "default"))
    layers = [module for module in twin.modules() if isinstance(module, PrefixLayer)]
    assert bool(layers) == (kind == "prefix")
    assert all(next(layer._adapter[0].parameters()) is own for layer in layers)
    with torch.no_grad():
        own.zero_()
    assert not torch.equal(tiny.logits(twin), wanted)
    assert torch.equal(tiny.logits(model), wanted)


@pytest.mark.parametrize("order", [("prefix",), ("prefix", "prefix"), ("prefix", "soft")])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(order: tuple[str, ...], reentrant: bool) -> None:
    """Layers that lose their cache get the prefix all the same, several of them in the same order."""
    results = []
    for checkpointing in (False, True):
        model = tiny.llama()
        for i, kind in enumerate(order):
            applied(model, kind, adapter=f"{i}", seed=i)
        if checkpointing:
            enable_checkpointing(model, {"use_reentrant": reentrant})
            model.enable_input_require_grads()
        out = model.train()(tiny.TOKENS)
        assert not checkpointing or cache_argument(model) not in out
        out.logits.square().mean().backward()
        results.append([out.logits.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for plain, found in zip(*results, strict=True):
        close(found, plain)


def mistral(window: int) -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return MistralForCausalLM(
        MistralConfig(vocab_size=96, num_key_value_heads=2, sliding_window=window, **sizes)  # for 7 tokens
    )


@pytest.mark.parametrize("prefixes", [1, 2])
@pytest.mark.parametrize("window", [2, 3, 4, 6, 20])
def test_gradient_checkpointing_of_layers_with_a_window(window: int, prefixes: int) -> None:
    """Prefixes of 3 tokens each, longer and shorter than the window: the layer sees as much as its cache would keep."""
    results = []
    for checkpointing in (False, True):
        model = mistral(window)
        for i in range(prefixes):
            applied(model, "prefix", adapter=f"{i}", seed=i)
        if checkpointing:
            enable_checkpointing(model, {"use_reentrant": False})
        out = model.train()(tiny.TOKENS)
        out.logits.square().mean().backward()
        results.append([out.logits.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert any(gradient.abs().max() > 0 for gradient in results[0][1:])
    for plain, found in zip(*results, strict=True):
        close(found, plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", tiny.MODELS.values())
def test_bf16(make: Callable[[], nn.Module], kind: str) -> None:
    """The adapter stays fp32 beside a bf16 base and gets fp32 gradients; autocast over an fp32 base works."""
    model = applied(make().bfloat16(), kind)
    wanted = tiny.logits(applied(make(), kind))
    output = model(**tiny.inputs(model)).logits
    assert output.dtype == torch.bfloat16
    close(output.float(), wanted, atol=0.05 * wanted.abs().max().item())
    output.float().square().mean().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for _, p in adapter_parameters(model, "default"))
    model = applied(make(), kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(tiny.logits(model).float(), wanted, atol=0.05 * wanted.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_leaves_no_cache_behind(kind: str) -> None:
    model = applied(tiny.llama(), kind).train()
    gc.collect()
    gc.disable()
    try:
        before = _caches()
        model(input_ids=tiny.TOKENS, labels=tiny.TOKENS, use_cache=True).loss.backward()
        assert _caches() == before
    finally:
        gc.enable()


def test_a_cache_with_a_graph_is_copied_and_pickled() -> None:
    model = applied(tiny.llama(), "prefix").train()
    cache = model(tiny.TOKENS, use_cache=True)[cache_argument(model)]
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), copy.deepcopy(copy.deepcopy(cache))):
        assert torch.equal(twin.layers[1].keys, cache.layers[1].keys)
    shallow = copy.copy(cache.layers[0])
    del cache, twin
    gc.collect()
    with pytest.raises(peftcore.PeftcoreError, match="Deep-copy the original"):
        copy.deepcopy(shallow)


def _caches() -> int:
    """How many layers of caches there are, of which some may be held by nothing but themselves."""
    return sum(issubclass(type(one), CacheLayerMixin) for one in gc.get_objects())
