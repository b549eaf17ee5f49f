"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691): train n vectors, prepended to the input embeddings.

         y_1 ........ y_m               the output, for the tokens of the input
          |            |
      .---+------------+---.
      |   frozen model     |
      '---+------------+---'
     |    |            |
    P [n, hidden]   E(x_1) … E(x_m)     P is trained; E is the frozen token embedding

n · hidden numbers are trained. The model itself does not change, so there is nothing to merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftcore.plugin import (
    Adapter,
    Architecture,
    Method,
    PeftcoreError,
    Placement,
    SoftPrompt,
    StateRules,
    hookimpl,
    prompt_tensor_name,
    validation,
)

peftcore_api = ">=3.0,<4"


@dataclass(frozen=True)
class PromptTuningConfig:
    """Config with the field names of Hugging Face PEFT's `PromptTuningConfig`.

    Args:
        num_virtual_tokens: n. Lester et al. found little gain above 20.
        prompt_tuning_init: initial values: "RANDOM" (normal, std 1), "SAMPLE_VOCAB" (embeddings of random tokens) or
            "TEXT" (embeddings of a text, repeated or truncated to n tokens).
        prompt_tuning_init_text, tokenizer_name_or_path, tokenizer_kwargs: the text and its tokenizer, for "TEXT".
        modules_to_save: modules to train in full as well. None means a classifier's head.
        token_dim, num_layers, num_attention_heads, num_transformer_submodules: taken from the model, and written for
            PEFT. In an encoder-decoder PEFT stores n rows each for encoder and decoder, but uses only the encoder's.
        initialize: False while loading, since the values come from the file; not saved.
    """

    num_virtual_tokens: int = 20
    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None
    modules_to_save: Sequence[str] | None = None
    token_dim: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None
    num_transformer_submodules: int | None = None
    initialize: bool = True

    def __post_init__(self) -> None:
        validation.check_types(self)
        validation.positive_whole(num_virtual_tokens=self.num_virtual_tokens)
        validation.require(
            self.prompt_tuning_init != "TEXT" or bool(self.prompt_tuning_init_text and self.tokenizer_name_or_path),
            "prompt_tuning_init='TEXT' needs prompt_tuning_init_text and tokenizer_name_or_path, found "
            f"{self.prompt_tuning_init_text!r} and {self.tokenizer_name_or_path!r}",
        )

    def resolved(self, model: nn.Module, architecture: Architecture) -> PromptTuningConfig:
        """Return the config with sizes filled in from the model."""
        embedding = token_embedding(model, architecture)
        return replace(
            self,
            token_dim=self.token_dim or (embedding.embedding_dim if embedding is not None else None),
            num_layers=self.num_layers or architecture.num_layers,
            num_attention_heads=self.num_attention_heads or architecture.num_heads,
            num_transformer_submodules=self.num_transformer_submodules or 1 + architecture.is_encoder_decoder,
        )


class Prompt(Adapter):
    """Prompt `prompt_embeddings` `[n · submodules, hidden]`. Only the first n rows are used."""

    def __init__(self, rows: Tensor, tokens: int) -> None:
        super().__init__()
        self.prompt_embeddings = nn.Parameter(rows)
        self.tokens = tokens

    def forward(self) -> Tensor:
        return self.prompt_embeddings[: self.tokens]


def token_embedding(model: nn.Module, architecture: Architecture) -> Any:
    """Return the token embedding, or None if it is unknown, which `apply` refuses later."""
    return None if architecture.embedding is None else model.get_submodule(architecture.embedding)


def initial_values(config: PromptTuningConfig, embedding: Any) -> Tensor:
    """Return initial values `[n · submodules, hidden]`, fp32, according to `prompt_tuning_init`."""
    count = config.num_virtual_tokens * (config.num_transformer_submodules or 1)
    rows = torch.empty(count, config.token_dim or 0)
    if rows.is_meta or not config.initialize or embedding is None:
        return rows
    if config.prompt_tuning_init == "RANDOM":
        return rows.normal_()
    if config.prompt_tuning_init == "SAMPLE_VOCAB":
        tokens = torch.randint(embedding.num_embeddings, (count,))
    else:
        text = text_tokens(config)
        tokens = torch.tensor((text * count)[:count])
    with torch.no_grad():
        return embedding(tokens.to(embedding.weight.device)).float().clone()


def text_tokens(config: PromptTuningConfig) -> list[int]:
    """Return the tokens of `prompt_tuning_init_text`."""
    from transformers import AutoTokenizer

    kwargs = dict(config.tokenizer_kwargs or {})
    if kwargs.pop("trust_remote_code", False):
        raise PeftcoreError(
            "tokenizer_kwargs sets trust_remote_code, but a config must not run code. Remove trust_remote_code"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, trust_remote_code=False, **kwargs)
    except (OSError, ValueError) as error:
        raise PeftcoreError(
            f"the tokenizer '{config.tokenizer_name_or_path}' of prompt_tuning_init='TEXT' cannot be loaded: {error}"
        ) from error
    tokens = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    if not tokens:
        raise PeftcoreError(
            f"prompt_tuning_init_text={config.prompt_tuning_init_text!r} has no tokens. Choose another text"
        )
    return tokens


def place(model: nn.Module, config: PromptTuningConfig, architecture: Architecture) -> list[Placement]:
    rows = initial_values(config, token_embedding(model, architecture))
    return [SoftPrompt(Prompt(rows, config.num_virtual_tokens))]


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(
        peft_type="PROMPT_TUNING",
        tensor_name=prompt_tensor_name,
        read=lambda _model, tensors, fields: (tensors, {**fields, "initialize": False}),
        write=lambda _model, tensors, fields: (tensors, {n: v for n, v in fields.items() if n != "initialize"}),
    )
    return [Method("prompt-tuning", PromptTuningConfig, place, rules, learning_rate=3e-2)]
