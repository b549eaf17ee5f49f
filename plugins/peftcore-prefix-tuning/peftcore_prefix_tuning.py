"""Prefix tuning (Li and Liang 2021, arXiv 2101.00190): train n keys and values in every layer.

    layer l:   softmax( q · [K_l ; k(x)]ᵀ / √d ) · [V_l ; v(x)]        K_l, V_l [kv_heads, n, head_dim], trained

    stored as  P [n, 2 · layers · kv_heads · head_dim], where the columns of layer l are K_l, then V_l
    projected  P = W_2 tanh(W_1 E + b_1) + b_2,  E [n, token_dim], W_1 [hidden, token_dim], which trains more stably

Without the projection 2 · n · layers · kv_heads · head_dim numbers are trained. Only training needs the projection:
files for inference contain just P, and files to continue training also contain E and the W.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftcore.plugin import (
    Adapter,
    Architecture,
    Fields,
    Method,
    PeftcoreError,
    Placement,
    PrefixKV,
    StateRules,
    Tensors,
    hookimpl,
    prompt_tensor_name,
    validation,
)

peftcore_api = ">=3.0,<4"


@dataclass(frozen=True)
class PrefixTuningConfig:
    """Config with the field names of Hugging Face PEFT's `PrefixTuningConfig`.

    Args:
        num_virtual_tokens: n.
        prefix_projection: train the prefix through a network of two layers.
        encoder_hidden_size: hidden size of the network. None: token_dim.
        init_weights: None (random) or "zero": keys and values start at zero.
        modules_to_save: modules to train in full as well. None means a classifier's head.
        token_dim, num_attention_heads, num_layers: kv_heads · head_dim, kv_heads and layers, taken from the model.
        num_transformer_submodules: for encoder-decoders. 2 (None) is PEFT's layout, where decoder layer l uses the
            prefix of layer 2l mod layers. With 1 each layer has its own prefix, which PEFT cannot load.
    """

    num_virtual_tokens: int = 20
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    init_weights: Literal["zero"] | None = None
    modules_to_save: Sequence[str] | None = None
    token_dim: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    num_transformer_submodules: int | None = None

    def __post_init__(self) -> None:
        validation.check_types(self)
        validation.positive_whole(num_virtual_tokens=self.num_virtual_tokens)
        if self.encoder_hidden_size is not None:
            validation.positive_whole(encoder_hidden_size=self.encoder_hidden_size)
        validation.one_of((None, 1, 2), num_transformer_submodules=self.num_transformer_submodules)

    def resolved(self, model: nn.Module, architecture: Architecture) -> PrefixTuningConfig:
        """Return the config with the sizes of the model's attention filled in."""
        heads, head_dim = architecture.num_kv_heads, architecture.head_dim
        layers = architecture.num_layers
        if architecture.is_encoder_decoder:
            config = getattr(model.get_submodule(architecture.decoder or ""), "config", model.config)
            layers = getattr(config, "decoder_layers", None) or getattr(config, "num_hidden_layers", None)
        if not (heads and head_dim and layers):
            raise PeftcoreError(
                f"the number of layers and heads of {type(model).__name__} is unknown. Provide it with a plugin's "
                "peftcore_architecture hook"
            )
        sizes = {"token_dim": heads * head_dim, "num_attention_heads": heads, "num_layers": layers}
        for name, value in sizes.items():
            if getattr(self, name) not in (None, value):
                raise PeftcoreError(
                    f"{name}={getattr(self, name)} does not fit {type(model).__name__}, which has {value} "
                    f"({layers} layers, {heads} key-value heads of {head_dim}). Leave it out"
                )
        return replace(
            self,
            token_dim=heads * head_dim,
            num_attention_heads=heads,
            num_layers=layers,
            encoder_hidden_size=self.encoder_hidden_size or heads * head_dim,
            num_transformer_submodules=self.num_transformer_submodules or 1 + architecture.is_encoder_decoder,
        )


class Prefix(Adapter):
    """Prefix of all layers: P itself, or E and the network that computes P from it."""

    def __init__(self, config: PrefixTuningConfig) -> None:
        super().__init__()
        n, heads = config.num_virtual_tokens, config.num_attention_heads
        layers, width = config.num_layers, config.token_dim
        assert layers is not None and heads is not None and width is not None  # `resolved` fills them in
        self.shape = (n, layers, 2, heads, -1)
        self.layers = [2 * i % layers for i in range(layers)] if config.num_transformer_submodules == 2 else None
        if config.prefix_projection:
            self.embedding = nn.Parameter(torch.empty(n, width).normal_())
            hidden_size = config.encoder_hidden_size or width
            self.projection = nn.Sequential(
                nn.Linear(width, hidden_size), nn.Tanh(), nn.Linear(hidden_size, layers * 2 * width)
            )
            output_parameters: Iterable[nn.Parameter] = self.projection[-1].parameters()
        else:
            self.prompt_embeddings = nn.Parameter(torch.empty(n, layers * 2 * width).normal_())
            output_parameters = [self.prompt_embeddings]
        if config.init_weights == "zero":
            for parameter in output_parameters:
                nn.init.zeros_(parameter)

    def rows(self) -> Tensor:
        """Return P `[n, 2 · layers · kv_heads · head_dim]`."""
        return self.projection(self.embedding) if hasattr(self, "projection") else self.prompt_embeddings

    def forward(self) -> Tensor:
        prefix = self.rows().view(self.shape).permute(1, 2, 3, 0, 4)  # [layers, 2, kv_heads, n, head_dim]
        return prefix if self.layers is None else prefix[self.layers]


def place(model: nn.Module, config: PrefixTuningConfig, architecture: Architecture) -> list[Placement]:
    return [PrefixKV(Prefix(config))]


def export(placement: PrefixKV) -> dict[str, Tensor]:
    """Return P, for libraries that do not know the projection."""
    adapter: Any = placement.adapter
    return {"prompt_embeddings": adapter.rows()} if hasattr(adapter, "projection") else {}


def read(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    """Turn the projection off for a file that contains P without it."""
    if tensors and "embedding" not in tensors:
        fields = {**fields, "prefix_projection": False}
    return tensors, fields


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(
        peft_type="PREFIX_TUNING",
        tensor_name=prompt_tensor_name,
        export=export,
        read=read,
    )
    return [Method("prefix-tuning", PrefixTuningConfig, place, rules, learning_rate=1e-2)]
