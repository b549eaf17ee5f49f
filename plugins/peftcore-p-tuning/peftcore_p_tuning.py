"""P-tuning (Liu et al. 2021, arXiv 2103.10385): a small network computes the prompt from n trained vectors.

    E [n, hidden]  ->  MLP, or LSTM and MLP  ->  P [n, hidden]  ->  before the embedded input, as in prompt tuning

E and the network are trained. Only training needs the network: files for inference contain just P, and files to
continue training also contain E and the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftcore.plugin import (
    Adapter,
    Architecture,
    Fields,
    Method,
    Placement,
    SoftPrompt,
    StateRules,
    Tensors,
    hookimpl,
    prompt_tensor_name,
    validation,
)

peftcore_api = ">=3.0,<4"


@dataclass(frozen=True)
class PTuningConfig:
    """Config with the field names of Hugging Face PEFT's `PromptEncoderConfig`.

    Args:
        num_virtual_tokens: n.
        encoder_reparameterization_type: "MLP" (three layers), "LSTM" (bidirectional, followed by two layers), or
            "NONE": train P itself, as a file without the network requires.
        encoder_hidden_size: hidden size of the network. None: token_dim.
        encoder_num_layers, encoder_dropout: layers and dropout of the LSTM.
        modules_to_save: modules to train in full as well. None means a classifier's head.
        token_dim, num_layers, num_attention_heads, num_transformer_submodules: taken from the model, and written for
            PEFT. In an encoder-decoder PEFT stores n rows each for encoder and decoder, but uses only the encoder's.
    """

    num_virtual_tokens: int = 20
    encoder_reparameterization_type: Literal["MLP", "LSTM", "NONE"] = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0
    modules_to_save: Sequence[str] | None = None
    token_dim: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None
    num_transformer_submodules: int | None = None

    def __post_init__(self) -> None:
        validation.check_types(self)
        validation.positive_whole(
            num_virtual_tokens=self.num_virtual_tokens, encoder_num_layers=self.encoder_num_layers
        )
        validation.probability(encoder_dropout=self.encoder_dropout)

    def resolved(self, model: nn.Module, architecture: Architecture) -> PTuningConfig:
        """Return the config with sizes filled in from the model."""
        embedding: Any = None if architecture.embedding is None else model.get_submodule(architecture.embedding)
        width = self.token_dim or getattr(embedding, "embedding_dim", None)
        defaults: dict[str, Any] = {"token_dim": width, "encoder_hidden_size": width}
        defaults |= {"num_layers": architecture.num_layers, "num_attention_heads": architecture.num_heads}
        defaults |= {"num_transformer_submodules": 1 + architecture.is_encoder_decoder}
        return replace(self, **{name: getattr(self, name) or value for name, value in defaults.items()})


class PromptEncoder(Adapter):
    """E `[n · submodules, hidden]` and the network, or P itself; returns the first n rows of P."""

    def __init__(self, config: PTuningConfig) -> None:
        super().__init__()
        width, hidden_size = config.token_dim or 0, config.encoder_hidden_size or 0
        rows = config.num_virtual_tokens * (config.num_transformer_submodules or 1)
        self.tokens, kind = config.num_virtual_tokens, config.encoder_reparameterization_type
        if kind == "NONE":
            self.prompt_embeddings = nn.Parameter(torch.empty(rows, width).normal_())
            return
        self.embedding = nn.Parameter(torch.empty(rows, width).normal_())
        if kind == "LSTM":
            depth, dropout = config.encoder_num_layers, config.encoder_dropout
            self.lstm_head = nn.LSTM(width, hidden_size, depth, dropout=dropout, bidirectional=True, batch_first=True)
        sizes = (
            [2 * hidden_size, 2 * hidden_size, width] if kind == "LSTM" else [width, hidden_size, hidden_size, width]
        )
        layers: list[nn.Module] = []
        for in_size, out_size in pairwise(sizes):
            layers += [nn.Linear(in_size, out_size), nn.ReLU()]
        self.mlp_head = nn.Sequential(*layers[:-1])

    def rows(self) -> Tensor:
        """Return P `[n · submodules, hidden]`."""
        if not hasattr(self, "embedding"):
            return self.prompt_embeddings
        x = self.embedding[None]
        return self.mlp_head(self.lstm_head(x)[0] if hasattr(self, "lstm_head") else x)[0]

    def forward(self) -> Tensor:
        return self.rows()[: self.tokens]


def place(model: nn.Module, config: PTuningConfig, architecture: Architecture) -> list[Placement]:
    return [SoftPrompt(PromptEncoder(config))]


def export(placement: SoftPrompt) -> dict[str, Tensor]:
    """Return P, computed without dropout, for libraries that do not know the network."""
    encoder: Any = placement.adapter
    training = encoder.training
    rows = encoder.eval().rows()
    encoder.train(training)
    return {"prompt_embeddings": rows} if hasattr(encoder, "embedding") else {}


def read(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    """Select "NONE" for a file that contains P without the network."""
    if tensors and "embedding" not in tensors:
        fields = {**fields, "encoder_reparameterization_type": "NONE"}
    return tensors, fields


def write(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    """Write "MLP" for "NONE", which PEFT does not have. PEFT only uses the field in training."""
    kind = fields["encoder_reparameterization_type"]
    return tensors, {**fields, "encoder_reparameterization_type": "MLP" if kind == "NONE" else kind}


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(
        peft_type="P_TUNING",
        tensor_name=prompt_tensor_name,
        export=export,
        read=read,
        write=write,
    )
    return [Method("p-tuning", PTuningConfig, place, rules, learning_rate=1e-3)]
