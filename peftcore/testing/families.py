"""Families of models for the suite: tiny transformers models, with random biases and norms."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.errors import PeftcoreError, nearest

# Layer widths are multiples of 32, so that each 4-bit format can quantize them.
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
EXPERT_SIZES = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_VOCABULARY = 96


def tokens(model: nn.Module, rows: int) -> dict[str, Tensor]:
    """Return a call of a text model with rows of one length, without padding."""
    input_ids = torch.randint(3, 90, (rows, 9), generator=torch.Generator().manual_seed(3))
    call = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        call["decoder_input_ids"] = input_ids[:, :5]
    return call


def _images(_model: nn.Module, rows: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(3))}


@dataclass(frozen=True)
class Family:
    """Family of models.

    Args:
        name: name of the family in reports and in `not_applicable`.
        make: returns a model in evaluation mode and without dropout, with the same weights at every call.
        inputs: (model, number of rows) -> arguments of a call, with one row per sample in each tensor. The model's
            first output must be a floating-point tensor with the rows in dimension 0.
        before: (model) -> None, called on dense and quantized models before the method is applied, such as to apply the
            existing adapters that a method builds on.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[Any, int], dict[str, Tensor]] = tokens
    before: Callable[[nn.Module], object] | None = None


class _TokenBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the tokens of all samples."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).view_as(x)


def tiny_llama(seed: int = 0, *, intermediate_size: int = SIZES["intermediate_size"]) -> nn.Module:
    """Return a Llama with 2 layers, hidden size 32, grouped-query attention and vocabulary 96, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {**SIZES, "intermediate_size": intermediate_size}
    return LlamaForCausalLM(LlamaConfig(**sizes, **_HEADS, **_SPECIAL, vocab_size=_VOCABULARY)).eval()


def _qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**SIZES, **_HEADS, **_SPECIAL, vocab_size=_VOCABULARY))


def _gemma() -> nn.Module:
    from transformers import GemmaConfig, GemmaForCausalLM

    return GemmaForCausalLM(GemmaConfig(**SIZES, **_HEADS, **_SPECIAL, head_dim=8, vocab_size=_VOCABULARY))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    off = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, **off, **_SPECIAL, vocab_size=_VOCABULARY))


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": SIZES["intermediate_size"], "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(
        T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0, vocab_size=_VOCABULARY)
    )


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**SIZES, **off, num_attention_heads=4, num_labels=3, vocab_size=_VOCABULARY)
    return BertForSequenceClassification(config)


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**SIZES, num_attention_heads=4, image_size=16, patch_size=8, num_labels=3)
    model = ViTForImageClassification(config)
    norm = model.vit.layernorm = _TokenBatchNorm(32)  # training changes the statistics, whatever the method
    for buffer in (norm.running_mean, norm.running_var):
        assert buffer is not None
        nn.init.uniform_(buffer, 0.5, 2)
    return model


def _qwen3_moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {**SIZES, **_HEADS, **EXPERT_SIZES, "head_dim": 8, "vocab_size": _VOCABULARY}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **_SPECIAL))


def _varied(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Wrap `make` so that the models have random biases and norms."""

    @cache
    def made() -> nn.Module:
        torch.manual_seed(0)
        model = make().eval()
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        return model

    def copied() -> nn.Module:
        model = _copy(made(), {})  # much faster than creating a model
        torch.manual_seed(0)  # gives every copy the same initial values of adapters that `before` applies
        return model

    return copied


def _copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return a deep copy, four times faster than `copy.deepcopy`, which mostly copies empty tables of hooks."""
    if id(module) in memo:
        copy_made: nn.Module = memo[id(module)]
        return copy_made
    module_copy = memo[id(module)] = type(module).__new__(type(module))
    for name, value in module.__dict__.items():
        if not value and type(value) in (dict, OrderedDict, set):
            module_copy.__dict__[name] = type(value)()
        elif name == "_modules":
            children = {key: None if child is None else _copy(child, memo) for key, child in value.items()}
            module_copy.__dict__[name] = children
        else:
            module_copy.__dict__[name] = copy.deepcopy(value, memo)
    return module_copy


def make_families() -> dict[str, Family]:
    """Return the families by name. Each family's model is created at its first use, and then copied."""
    families = (
        Family("Llama", _varied(tiny_llama)),
        Family("Qwen2", _varied(_qwen2)),  # biases
        Family("Gemma", _varied(_gemma)),  # a scaled embedding, tied to the head
        Family("GPT-2", _varied(_gpt2)),  # Conv1D, tied
        Family("T5", _varied(_t5)),  # encoder and decoder
        Family("BERT", _varied(_bert)),  # post-norm, with a classifier
        Family("ViT", _varied(_vit), _images),  # images, a BatchNorm
        Family("Qwen3-MoE", _varied(_qwen3_moe)),  # experts `[E, out, in]`
    )
    return {family.name: family for family in families}


FAMILIES = make_families()


def family_of(given: str | Family | Callable[[], nn.Module]) -> Family:
    """Return the family for a name, a `Family`, or a function that makes a model.

    Raises:
        PeftcoreError: no family has this name.
    """
    if isinstance(given, Family):
        return given
    if not isinstance(given, str):
        return Family(getattr(given, "__name__", "model"), given)
    if given not in FAMILIES:
        raise PeftcoreError(
            f"'{given}' is not a family{nearest(given, FAMILIES)}. Choose one of: {', '.join(FAMILIES)}"
        )
    return FAMILIES[given]
