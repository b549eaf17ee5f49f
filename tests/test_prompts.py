"""Soft prompts and prefixes, with toy methods: every step of generation is compared with one full forward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from census import instances
from torch import Tensor, nn

import peftcore
from peftcore import PeftcoreError, engine, prompts
from peftcore.engine import adapter_parameters
from peftcore.observation import detect
from peftcore.prompts.backbone import Backbone, learned_context
from peftcore.prompts.prefix import PrefixLayer
from peftcore.prompts.stand_ins import ordinary_token

pytestmark = pytest.mark.usefixtures("toys")

KINDS = ("soft", "prefix")
N = 3  # tokens of a toy prompt


def opt() -> nn.Module:
    """A decoder that computes positions from the mask itself, with an offset."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=96, num_attention_heads=4, max_position_embeddings=64, **sizes)).eval()


def bloom() -> nn.Module:
    """A decoder without positions: ALiBi, from the mask."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4)).eval()


def gemma3() -> nn.Module:
    """Sliding windows in every other layer, a scaled embedding, grouped-query attention."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8, "sliding_window": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["sliding_attention", "full_attention"]}
    return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=96, pad_token_id=0, **sizes, **heads)).eval()


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes |= {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64}
    return BartForConditionalGeneration(BartConfig(vocab_size=96, **sizes)).eval()


DECODERS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "opt": opt, "bloom": bloom, "gemma3": gemma3}


def mpt() -> nn.Module:
    """A decoder whose ALiBi counts padding."""
    from transformers import MptConfig, MptForCausalLM

    torch.manual_seed(0)
    return MptForCausalLM(MptConfig(vocab_size=96, d_model=32, n_layers=2, n_heads=4)).eval()


def falcon(**heads: Any) -> nn.Module:
    """A decoder that caches one head for all queries, or in its newer form one for each."""
    from transformers import FalconConfig, FalconForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
    return FalconForCausalLM(FalconConfig(vocab_size=96, **sizes, **heads)).eval()


def deepseek() -> nn.Module:
    """Latent attention: keys of 12 numbers a head, values of 8."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "first_k_dense_replace": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8}
    heads |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    return DeepseekV3ForCausalLM(DeepseekV3Config(vocab_size=96, pad_token_id=0, **sizes, **heads)).eval()


def mamba() -> nn.Module:
    """A recurrence, whose cache holds no tokens."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, pad_token_id=0)).eval()


ENCODER_DECODERS = {"t5": tiny.t5, "bart": bart}


def applied(model: nn.Module, kind: str, adapter: str = "default", seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    peftcore.apply(model, kind, adapter=adapter)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model, adapter):
            parameter.mul_(10)  # std 1
    return model


def logits(model: nn.Module, tokens: Tensor | None = None, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=mask, **kwargs).logits


def close(found: Tensor, wanted: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


def by_hand(model: nn.Module, kind: str, tokens: Tensor) -> Tensor:
    """The logits of the base, with the prompt put before the input by the definition."""
    vectors = dict(adapter_parameters(model, "default"))
    (vectors,) = vectors.values()
    with peftcore.disabled(model), torch.no_grad():
        if kind == "soft":
            embedded = model.get_input_embeddings()(tokens)
            whole = torch.cat([vectors.expand(tokens.shape[0], -1, -1), embedded], dim=1)
            return model(inputs_embeds=whole).logits[:, N:]
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
        for layer, (key, value) in enumerate(vectors):
            shape = (tokens.shape[0], *key.shape)
            cache.update(key.expand(shape), value.expand(shape), layer)
        return model(input_ids=tokens, cache=cache).logits


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


def generate(model: nn.Module, tokens: Tensor, mask: Tensor | None = None, **changes: Any) -> Any:
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_logits": True}
    settings |= {"return_dict_in_generate": True, "pad_token_id": 0, **changes}
    return model.generate(tokens, attention_mask=torch.ones_like(tokens) if mask is None else mask, **settings)


def check_steps(model: nn.Module, out: Any, length: int, mask: Tensor | None = None) -> None:
    """The logits of every step are those of one full forward over what came out."""
    whole = out.sequences
    full = torch.ones_like(whole)
    if mask is not None:
        full[:, :length] = mask
    wanted = logits(model, whole, full)[:, length - 1 : -1]
    close(torch.stack(out.logits, dim=1), wanted, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", DECODERS.values(), ids=DECODERS)
def test_generate(make: Callable[[], nn.Module], kind: str) -> None:
    model = applied(make(), kind)
    outs = [generate(model, tiny.TOKENS, use_cache=use_cache) for use_cache in (True, False)]
    for out in outs:
        check_steps(model, out, tiny.TOKENS.shape[1])
    assert torch.equal(outs[0].sequences, outs[1].sequences)


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


COUNTING = ["Gemma3", "Gemma4", "Mistral", "Jamba", "Bamba", "Zamba2", "Lfm2", "Qwen3Next", "FalconH1", "GptOss"]


# Models that make more of tokens than their embeddings: a table for each layer (Gemma 4), routes (DeepSeek-V4), masks
# and positions of images, positions without padding (RoBERTa); and one that takes no embeddings (CLIP's text part).
BY_TOKENS = [
    "CLIPTextModel",
    "DeepseekV4ForCausalLM",
    "Gemma3ForConditionalGeneration",
    "Gemma4ForCausalLM",
    "MllamaForCausalLM",
    "PaliGemmaForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "RobertaModel",
    "XLMForSequenceClassification",
]


@pytest.mark.parametrize("name", BY_TOKENS)
def test_a_soft_prompt_that_is_the_embedding_of_tokens(name: str) -> None:
    """Three vectors that a token is embedded as are this token three times."""
    model = instances.build(name)
    own = torch.full((2, N), ordinary_token(model.config))
    tokens = tiny.TOKENS % 60 + 30
    model = applied(model, "soft")
    with torch.no_grad(), peftcore.disabled(model):
        embedded = model.get_input_embeddings()(own)
        wanted = model(input_ids=torch.cat([own, tokens], dim=1))[0]
    with torch.no_grad():
        next(iter(dict(adapter_parameters(model, "default")).values())).copy_(embedded[0])
        found = model(input_ids=tokens)[0]
        close(found, wanted[:, N:] if wanted.shape[1] > found.shape[1] else wanted, atol=1e-4)


def test_two_soft_prompts_by_tokens() -> None:
    """The later one stands next to the input, padding before both."""
    model = instances.build("Gemma3ForConditionalGeneration")
    for seed in range(2):
        applied(model, "soft", adapter=f"{seed}", seed=seed)
    tokens = tiny.TOKENS[1:] % 60 + 30
    rows, mask = padded(tokens, 9)
    by_tokens = logits(model, rows, mask, token_type_ids=torch.zeros_like(rows))
    with torch.no_grad():
        by_embeddings = model(inputs_embeds=model.get_input_embeddings()(rows), attention_mask=mask).logits
    close(by_tokens, by_embeddings)
    close(by_tokens[1:, -7:], logits(model, tokens, torch.ones_like(tokens)))


def padded(tokens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Two rows, of which the second is `tokens [1, n]` with padding before it, and their mask."""
    gap = length - tokens.shape[1]
    rows = torch.stack([tokens[0].repeat(length)[:length], torch.cat([torch.zeros(gap, dtype=torch.long), tokens[0]])])
    mask = torch.ones_like(rows)
    mask[1, :gap] = 0
    return rows, mask


@pytest.mark.parametrize("family", COUNTING)
def test_padding_does_not_part_a_soft_prompt_from_the_input(family: str) -> None:
    """Windows count places and recurrences run over them, padding included."""
    model = applied(instances.build(f"{family}ForCausalLM"), "soft")
    tokens = tiny.TOKENS[:1, :5]
    rows, mask = padded(tokens, 19)
    alone = generate(model, tokens, torch.ones_like(tokens)).logits
    for step, wanted in zip(generate(model, rows, mask).logits, alone, strict=True):
        close(step[1:], wanted, atol=1e-4)


def test_a_prefix_and_padding_beyond_a_window() -> None:
    model = applied(instances.build("Gemma3ForCausalLM"), "prefix")  # it looks 8 tokens back
    tokens = tiny.TOKENS[:1, :3]
    rows, mask = padded(tokens, 5)
    close(logits(model, rows, mask)[1:, -3:], logits(model, tokens))
    with pytest.raises(PeftcoreError, match="looks 8 tokens back, so that padding would part the prefix"):
        logits(model, *padded(tokens, 6))


def test_padding_between_two_prompts_and_a_prefix() -> None:
    model = tiny.llama()
    for i, kind in enumerate(("soft", "prefix", "soft")):
        applied(model, kind, adapter=f"{i}", seed=i)
    tokens = tiny.TOKENS[:1, :5]
    alone = generate(model, tokens, torch.ones_like(tokens)).logits
    for step, wanted in zip(generate(model, *padded(tokens, 9)).logits, alone, strict=True):
        close(step[1:], wanted)


def test_padding_before_an_encoder_s_input() -> None:
    model = applied(tiny.t5(), "soft")
    tokens = tiny.TOKENS[:1, :5]
    rows, mask = padded(tokens, 9)
    alone = logits(model, tokens, torch.ones_like(tokens), decoder_input_ids=tokens)
    close(logits(model, rows, mask, decoder_input_ids=tokens.repeat(2, 1))[1:], alone)


@pytest.mark.parametrize("heads", [{}, {"multi_query": False}, {"new_decoder_architecture": True, "num_kv_heads": 2}])
def test_falcon_s_heads(heads: dict[str, Any]) -> None:
    model = applied(falcon(**heads), "prefix")
    out = generate(model, tiny.TOKENS)
    check_steps(model, out, tiny.TOKENS.shape[1])


def test_a_prefix_and_padding_that_counts() -> None:
    """MPT's distances count padding: rows padded on the right are as alone, others are refused."""
    model = applied(mpt(), "prefix")
    mask = torch.ones_like(tiny.TOKENS)
    mask[1, 4:] = 0
    close(logits(model, tiny.TOKENS, mask)[1, :4], logits(model, tiny.TOKENS[1:, :4])[0])
    with pytest.raises(PeftcoreError, match="MptModel counts padding in its distances"):
        logits(model, tiny.TOKENS, mask.flip(1))


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
    for padded in (0, 2):
        tokens, mask = tiny.TOKENS, torch.ones_like(tiny.TOKENS)
        mask[0, :padded] = 0
        wanted = logits(model, tokens, mask)
        with torch.no_grad():
            out = model(tokens[:, :4], mask[:, :4], use_cache=True)
            steps = [out.logits]
            for i in range(4, tokens.shape[1]):
                out = model(tokens[:, i : i + 1], mask[:, : i + 1], cache=out.cache)
                steps.append(out.logits)
        close(torch.cat(steps, dim=1)[mask == 1], wanted[mask == 1])


def test_a_prefix_asks_for_no_cache() -> None:
    model = applied(tiny.llama(), "prefix")
    assert model(tiny.TOKENS, use_cache=False).cache is None
    assert model(tiny.TOKENS).cache.get_seq_length() == N + tiny.TOKENS.shape[1]


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
        wanted = model(inputs_embeds=rows, cache=cache).logits[:, -tiny.TOKENS.shape[1] :]
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
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        out = model.train()(tiny.TOKENS)
        assert not checkpointing or out.cache is None
        out.logits.square().mean().backward()
        results.append([out.logits.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for plain, found in zip(*results, strict=True):
        close(found, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_generation(kind: str) -> None:
    """A compiled forward with a cache, at prefill and at each step; nothing falls back to Python."""
    model = applied(tiny.llama(), kind)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    wanted = logits(model, tiny.TOKENS)
    with torch.no_grad():
        out = compiled(tiny.TOKENS[:, :5], use_cache=True)
        last = compiled(tiny.TOKENS[:, 5:], cache=out.cache)
    close(torch.cat([out.logits, last.logits], dim=1), wanted)
    torch._dynamo.reset()


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
@pytest.mark.parametrize("make", [tiny.gpt2, opt, tiny.roberta_classifier])
def test_input_that_leaves_no_room(make: Callable[[], nn.Module], kind: str) -> None:
    """Where positions are learned, the prompt takes some of them."""
    model = make()
    context = learned_context(model.base_model)
    assert context == (510 if "Roberta" in type(model).__name__ else 64)
    applied(model, kind)
    tokens = torch.full((1, context - N), 5)
    assert logits(model, tokens).isfinite().all()
    with pytest.raises(PeftcoreError, match=f"{context - 2} tokens of input and a prompt of {N} are more than the"):
        logits(model, torch.full((1, context - N + 1), 5))


class Vectors(tiny.Vectors):
    """A toy adapter's vectors of a fixed shape."""


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (lambda: peftcore.SoftPrompt(Vectors(64, 32)), "64 tokens leaves no room for input: the context of GPT2LMHead"),
        (lambda: peftcore.SoftPrompt(Vectors(4, 31)), "the prompt's vectors have 31 numbers, the token embedding 32"),
        (lambda: peftcore.SoftPrompt(Vectors(1, 4, 32)), r"returns \[tokens, hidden\], found a tensor of shape \[1, 4"),
        (lambda: peftcore.PrefixKV(Vectors(2, 2, 4, 64, 8)), "64 tokens leaves no room for input"),
        (lambda: peftcore.PrefixKV(Vectors(3, 2, 4, 5, 8)), r"for 3 layers, .* with a cache in 2: \[0, 1\]"),
        (lambda: peftcore.PrefixKV(Vectors(4, 5, 8)), r"returns \[layers, 2, kv_heads, tokens, head_dim\], found"),
    ],
)
def test_wrong_shapes(placement: Callable[[], Any], message: str) -> None:
    model = tiny.gpt2()
    with pytest.raises(PeftcoreError, match=message):
        prompts.compiled(model, detect(model), placement())


def test_models_that_cannot() -> None:
    from transformers import DistilBertConfig, DistilBertModel, ViTConfig, ViTModel

    distilbert = DistilBertModel(DistilBertConfig(vocab_size=96, dim=32, n_layers=2, n_heads=4, hidden_dim=48))
    with pytest.raises(PeftcoreError, match="needs attention that takes a cache; that of DistilBertModel takes none"):
        prompts.compiled(distilbert, detect(distilbert), peftcore.PrefixKV(Vectors(2, 2, 4, 3, 8)))
    assert torch.isfinite(peftcore.apply(distilbert, "soft")(tiny.TOKENS)[0]).all()
    with pytest.raises(PeftcoreError, match="DeepseekV3ForCausalLM has latent attention"):
        peftcore.apply(deepseek(), "prefix")
    check_steps(soft := applied(deepseek(), "soft"), generate(soft, tiny.TOKENS), tiny.TOKENS.shape[1])
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    vit = ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes))
    with pytest.raises(PeftcoreError, match=r"needs|takes"):
        peftcore.apply(vit, "prefix")


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_that_cannot_be_extended(kind: str) -> None:
    model = applied(tiny.llama(), kind)
    with pytest.raises(PeftcoreError, match=r"needs a 2-d attention mask .*found \[2, 1, 7, 7\]"):
        logits(model, tiny.TOKENS, torch.ones(2, 1, 7, 7))
