"""Models that make more of tokens than their embeddings get stand-ins for a soft prompt's."""

from __future__ import annotations

import pytest
import torch
from census import instances
from support import tiny
from support.prompted import N, applied, close, logits, padded

import peftcore
from peftcore.engine import adapter_parameters
from peftcore.engine.prompts.soft_prompt import ordinary_token

pytestmark = pytest.mark.usefixtures("toys")


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
