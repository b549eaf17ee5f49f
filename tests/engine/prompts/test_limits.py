"""Where no room is left, shapes are wrong, or a model has no place for a prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import tiny
from support.prompted import KINDS, N, Vectors, applied, check_steps, deepseek, generate, logits, opt
from torch import nn

import peftcore
from peftcore import PeftcoreError
from peftcore.engine.attachments import AdapterAttachments
from peftcore.engine.prompts.backbone import learned_context
from peftcore.model import detect
from peftcore.plugin import PrefixKV, SoftPrompt
from peftcore.plugin.registry import registry

pytestmark = pytest.mark.usefixtures("toys")


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
    with pytest.raises(PeftcoreError, match=f"{context - 2} input tokens and a prompt of {N} tokens exceed the"):
        logits(model, torch.full((1, context - N + 1), 5))


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (lambda: SoftPrompt(Vectors(64, 32)), "64 tokens leaves no room for input, since the context of GPT2LMHead"),
        (
            lambda: SoftPrompt(Vectors(4, 31)),
            "the prompt's vectors have width 31, but the token embedding has width 32",
        ),
        (lambda: SoftPrompt(Vectors(1, 4, 32)), r"must return a tensor \[tokens, hidden\], found shape \[1, 4"),
        (lambda: PrefixKV(Vectors(2, 2, 4, 64, 8)), "64 tokens leaves no room for input"),
        (lambda: PrefixKV(Vectors(3, 2, 4, 5, 8)), r"for 3 layers, .* with a cache in 2: \[0, 1\]"),
        (lambda: PrefixKV(Vectors(4, 5, 8)), r"must return a tensor \[layers, 2, kv_heads, tokens, head_dim\], found"),
    ],
)
def test_wrong_shapes(placement: Callable[[], Any], message: str) -> None:
    model = tiny.gpt2()
    with pytest.raises(PeftcoreError, match=message):
        placement().attach(AdapterAttachments(model, detect(model), registry.method("soft")))


def test_models_that_cannot() -> None:
    from transformers import DistilBertConfig, DistilBertModel, ViTConfig, ViTModel

    distilbert = DistilBertModel(DistilBertConfig(vocab_size=96, dim=32, n_layers=2, n_heads=4, hidden_dim=48))
    with pytest.raises(PeftcoreError, match="needs attention with a cache, but DistilBertModel has none"):
        PrefixKV(Vectors(2, 2, 4, 3, 8)).attach(
            AdapterAttachments(distilbert, detect(distilbert), registry.method("prefix"))
        )
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
    with pytest.raises(PeftcoreError, match=r"needs an attention mask .*found \[2, 1, 7, 7\]"):
        logits(model, tiny.TOKENS, torch.ones(2, 1, 7, 7))
