"""Generate the answer of a language model to a prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from peftcore.errors import PeftcoreError
from peftcore_cli.data.row import Messages
from peftcore_cli.tasks import conversations, positions
from peftcore_cli.tasks.encoded_examples import is_encoder_decoder


@torch.no_grad()
def generate_text(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Messages,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    streamer: Any = None,
) -> str:
    """Return a language model's answer to `prompt`: greedy, or sampled at a temperature above 0.

    Args:
        model: the model.
        tokenizer: the tokenizer.
        prompt: a text, or a conversation for the tokenizer's chat template.
        max_new_tokens: maximum number of tokens to generate.
        temperature: sampling temperature; 0 for greedy decoding.
        seed: random seed of sampling.
        streamer: transformers streamer that receives the tokens.
    """
    if isinstance(prompt, str):
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        text = conversations.render(tokenizer, prompt, begins_answer=True)
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    inputs = inputs.to(next(model.parameters()).device)
    if inputs["input_ids"].shape[1] == 0:
        inputs = {"input_ids": torch.tensor([[first_token(tokenizer)]], device=next(model.parameters()).device)}
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        generate: Any = model.generate
        with positions.generation_within(model, "its maximum length"):
            tokens = generate(
                **inputs,
                **sampling,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=end_tokens(model, tokenizer),
                streamer=streamer,
            )
    begin = 0 if is_encoder_decoder(model) else inputs["input_ids"].shape[1]
    return tokenizer.decode(tokens[0, begin:], skip_special_tokens=True)


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Return the tokens that end an answer, from the tokenizer and the generation config."""
    config_tokens = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    tokens = [tokenizer.eos_token_id, *(config_tokens if isinstance(config_tokens, list) else [config_tokens])]
    return sorted({token for token in tokens if token is not None}) or None


def first_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that replaces an empty prompt."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        if token is not None:
            return token
    raise PeftcoreError("the prompt is empty, and the tokenizer has no beginning-of-text token. Pass a prompt")
