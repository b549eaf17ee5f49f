"""The tokens that are edited are the same ones, whatever a cache holds: recurrent states, a prefix, padding."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from support import tiny
from support.releases import BEFORE_5_24
from torch import Tensor, nn

import peftcore
from peftcore.plugin import cache_argument, disturb

SIZES = {"vocab_size": 96, "hidden_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "num_hidden_layers": 2}
LINEAR = {f"linear_num_{part}_heads": 2 for part in ("key", "value")}
LINEAR |= {f"linear_{part}_head_dim": 8 for part in ("key", "value")}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MOE |= {"shared_expert_intermediate_size": 16, "head_dim": 8}
STATE = {"state_size": 8, "num_hidden_layers": 2}
# Of the first three a recurrent layer comes first. The caches of the next two count no tokens. The last one keeps its
# states in its modules.
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3Next": {**HEADS, **LINEAR, **MOE, "layer_types": ["linear_attention", "full_attention"]},
    "Jamba": {**HEADS, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_dt_rank": 4},
    "Lfm2": {**HEADS, "layer_types": ["conv", "full_attention"]},
    "Mamba": STATE,
    "Mamba2": {**STATE, "num_heads": 4, "head_dim": 16, "n_groups": 1},
    "RecurrentGemma": {**HEADS, "block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 8},
}
HYBRID, RECURRENT = ["Qwen3Next", "Jamba", "Lfm2"], ["Mamba", "Mamba2"]
TOKENS = tiny.TOKENS[:, :3]
PADDED = torch.tensor([[1, 1, 1], [0, 1, 1]])


@cache
def tiny_model(name: str) -> Any:
    """A tiny model whose matrices are of the order of a trained one's."""
    config = getattr(transformers, f"{name}Config")(**SIZES, **FAMILIES[name])
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.add_(torch.randn_like(parameter) * parameter.shape[1] ** -0.5)
    return model


def apply_reft(model: nn.Module, **fields: Any) -> nn.Module:
    """A method with edits in the first 5 tokens: some are in the prompt, some are generated."""
    peftcore.apply(model, "reft", r=2, dropout=0.0, **{"prefix_positions": 5, **fields})
    disturb(model, "default", seed=1, std=0.5)
    return model


def generate_logits(model: Any, mask: Tensor, **settings: Any) -> Tensor:
    """The logits of 5 steps, `[batch, 5, vocabulary]`."""
    generation = model.generate(
        TOKENS,
        attention_mask=mask,
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )
    return torch.stack(generation.logits, 1)


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Any:
    actual = tiny_model(request.param)
    yield apply_reft(actual)
    peftcore.remove(actual, "default")


@pytest.mark.parametrize("model", list(FAMILIES), indirect=True)
@pytest.mark.parametrize("mask", [torch.ones_like(PADDED), PADDED], ids=["whole", "padded"])
def test_generation_with_a_cache_and_without(model: Any, mask: Tensor) -> None:
    if BEFORE_5_24 and mask is PADDED and type(model).__name__ == "RecurrentGemmaForCausalLM":
        pytest.skip("refused: the cache of transformers 5.20 counts no tokens behind a recurrent layer")
    torch.testing.assert_close(
        generate_logits(model, mask), generate_logits(model, mask, use_cache=False), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("mask", [torch.ones_like(PADDED), PADDED], ids=["whole", "padded"])
def test_a_decoder_that_its_head_calls_past_the_backbone(mask: Tensor) -> None:
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    torch.manual_seed(0)
    config = transformers.BartConfig(vocab_size=96, **sizes, init_std=0.3, is_decoder=True)
    model = apply_reft(transformers.BartForCausalLM(config).eval())
    torch.testing.assert_close(
        generate_logits(model, mask), generate_logits(model, mask, use_cache=False), rtol=1e-3, atol=1e-3
    )


def logits_of_calls(model: Any, parts: list[int], masks: str) -> Tensor:
    """The logits of tiny.TOKENS, of which each call gets so many."""
    ends = torch.tensor(parts).cumsum(0).tolist()
    mask = torch.ones_like(tiny.TOKENS)
    mask[1, :2] = 0
    options: dict[str, Any] = {}
    outputs, name = [], cache_argument(model)
    for start, end in zip([0, *ends], ends, strict=False):
        if masks == "whole":
            options["attention_mask"] = mask[:, :end]
        elif masks == "each":
            options["attention_mask"] = mask[:, start:end]
        out = model(input_ids=tiny.TOKENS[:, start:end], use_cache=True, **options)
        options = {name: out[name]}
        outputs.append(out.logits)
    logits = torch.cat(outputs, 1)
    return logits if masks == "none" else logits[mask == 1]


@pytest.mark.parametrize("model", [*HYBRID, "Mamba2"], indirect=True)
@pytest.mark.parametrize("masks", ["none", "whole"])
def test_a_text_in_several_calls(model: Any, masks: str) -> None:
    with torch.no_grad():
        torch.testing.assert_close(
            logits_of_calls(model, [2, 1, 1, 1, 1, 1], masks), logits_of_calls(model, [7], masks), rtol=1e-3, atol=1e-3
        )


def test_masks_of_the_new_tokens_alone() -> None:
    """A recurrence needs no other; which tokens came before is noted on the cache, padding aside."""
    model = apply_reft(copy.deepcopy(tiny_model("Mamba2")))
    with torch.no_grad():
        each, whole = logits_of_calls(model, [3, 4], "each"), logits_of_calls(model, [7], "each")
    torch.testing.assert_close(each, whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mask", [torch.ones_like(PADDED), PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.t5])
def test_next_to_a_prefix(make: Any, mask: Tensor) -> None:
    model = make()
    peftcore.apply(model, "prefix-tuning", adapter="prefix", num_virtual_tokens=3)
    disturb(model, "prefix", seed=2, std=0.3)
    apply_reft(model)
    peftcore.activate(model, ["prefix", "default"])
    torch.testing.assert_close(
        generate_logits(model, mask), generate_logits(model, mask, use_cache=False), rtol=1e-3, atol=1e-3
    )
    if not model.config.is_encoder_decoder:
        with torch.no_grad():
            torch.testing.assert_close(
                logits_of_calls(model, [2, 1, 4], "none"), logits_of_calls(model, [7], "none"), rtol=1e-3, atol=1e-3
            )


def test_a_recurrence_that_read_before_the_adapter_came() -> None:
    model: Any = copy.deepcopy(tiny_model("Mamba2"))
    name = cache_argument(model)
    with torch.no_grad():
        before = model(input_ids=TOKENS, use_cache=True)[name]
        apply_reft(model)
        with pytest.raises(peftcore.PeftcoreError, match=r"ReFT counts .* Pass an attention_mask that covers all"):
            model(input_ids=TOKENS, **{name: before})


def test_texts_that_are_packed_into_one_row() -> None:
    """Positions begin anew where a text does: each has first tokens and last ones of its own."""
    model: Any = apply_reft(tiny.llama(), prefix_positions=2, suffix_positions=1)
    texts = [tiny.TOKENS[:1, :4], tiny.TOKENS[1:, :3], tiny.TOKENS[:1, 4:6]]
    positions = torch.cat([torch.arange(text.shape[1]) for text in texts])[None]
    with torch.no_grad():
        expected = torch.cat([model(input_ids=text).logits for text in texts], 1)
        actual = model(input_ids=torch.cat(texts, 1), position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(peftcore.PeftcoreError, match="prompt_lengths has one length per row"):
            model(input_ids=torch.cat(texts, 1), position_ids=positions, use_cache=False, prompt_lengths=[2])


def test_a_decoder_that_makes_its_tokens_of_labels() -> None:
    """The encoder's padding is not the decoder's."""
    model: Any = apply_reft(tiny.t5(), prefix_positions=2)
    mask = torch.tensor([[1] * 7, [0, 0, 0, 1, 1, 1, 1]])
    labels = tiny.TOKENS[:, 2:6].contiguous()
    with torch.no_grad():
        actual = model(input_ids=tiny.TOKENS, attention_mask=mask, labels=labels).logits
        decoder = model.prepare_decoder_input_ids_from_labels(labels)
        expected = model(input_ids=tiny.TOKENS, attention_mask=mask, decoder_input_ids=decoder).logits
    torch.testing.assert_close(actual, expected)


def test_a_soft_prompt_is_refused_with_a_mask_and_without() -> None:
    model: Any = peftcore.apply(tiny.llama(), "reft")
    peftcore.apply(model, "prompt-tuning", adapter="prompt", num_virtual_tokens=3)
    peftcore.activate(model, ["default", "prompt"])
    for mask in (None, torch.ones_like(tiny.TOKENS)):
        with pytest.raises(peftcore.PeftcoreError, match="a soft prompt precedes the input"):
            model(input_ids=tiny.TOKENS, attention_mask=mask)


def test_last_tokens_that_would_move_are_said() -> None:
    model: Any = apply_reft(tiny.llama(), suffix_positions=1)
    with pytest.warns(UserWarning, match="Pass prompt_lengths"):
        generate_logits(model, PADDED, use_cache=False)
    generate_logits(model, PADDED, use_cache=False, prompt_lengths=torch.tensor([3, 2]))
    generate_logits(model, PADDED)


def test_a_mask_of_more_tokens_than_there_are() -> None:
    """Such as that of frames of sound, of which an encoder makes half as many."""
    model: Any = apply_reft(tiny.llama())
    with pytest.raises(peftcore.PeftcoreError, match="the mask has 14 columns for 0 tokens in the cache and 7 new"):
        model(input_ids=tiny.TOKENS, attention_mask=torch.ones(2, 14))
