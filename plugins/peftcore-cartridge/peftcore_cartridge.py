"""Cartridges (Eyuboglu et al. 2025, arXiv 2506.06266): a short, trained KV cache that stands in for a long text.

    layer l:   softmax( q · [K_l ; k(x)]ᵀ / √d ) · [V_l ; v(x)]        K_l, V_l [kv_heads, n, head_dim], trained

This is prefix tuning without a projection, with two differences. The first tokens stay frozen, since they are attention
sinks. And `apply(model, "cartridge", batches=loader)` starts from the model's own cache of the first n tokens of the
first text (section 3.2 of the paper). Without batches K and V are random at the start, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peftcore_prefix_tuning import Prefix, PrefixTuningConfig
from torch import Tensor, nn

from peftcore.plugin import (
    Architecture,
    Fields,
    Method,
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
class CartridgeConfig:
    """Config with the field names of Hugging Face PEFT's `CartridgeConfig`.

    Args:
        num_virtual_tokens: n, the length of the cache.
        num_frozen_tokens: how many of the first tokens stay frozen.
        modules_to_save: modules to train in full as well. None means a classifier's head.
        token_dim, num_attention_heads, num_layers, num_transformer_submodules: as in prefix tuning.
    """

    num_virtual_tokens: int = 20
    num_frozen_tokens: int = 1
    modules_to_save: Sequence[str] | None = None
    token_dim: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    num_transformer_submodules: int | None = None

    def __post_init__(self) -> None:
        validation.check_types(self)
        self.prefix()
        fits = 0 <= self.num_frozen_tokens < self.num_virtual_tokens
        counts = f"{self.num_frozen_tokens} of {self.num_virtual_tokens}"
        validation.require(fits, f"num_frozen_tokens must leave a token to train, found {counts}")

    def prefix(self) -> PrefixTuningConfig:
        """Return the equivalent config of prefix tuning."""
        fields = {name: value for name, value in vars(self).items() if name != "num_frozen_tokens"}
        return PrefixTuningConfig(**fields)

    def resolved(self, model: nn.Module, architecture: Architecture) -> CartridgeConfig:
        """Return the config with the sizes of the model's attention filled in."""
        prefix = self.prefix().resolved(model, architecture)
        return replace(self, **{name: getattr(prefix, name) for name in vars(self) if hasattr(prefix, name)})


class Cartridge(Prefix):
    """Cache P `[n, 2 · layers · kv_heads · head_dim]`, one row per token. The first rows are frozen."""

    frozen_embedding: Tensor

    def __init__(self, config: CartridgeConfig) -> None:
        super().__init__(config.prefix())
        rows, frozen = self.prompt_embeddings.data, config.num_frozen_tokens
        del self.prompt_embeddings
        self.register_buffer("frozen_embedding", rows[:frozen].clone())
        self.trainable_embedding = nn.Parameter(rows[frozen:].clone())

    def rows(self) -> Tensor:
        return torch.cat([self.frozen_embedding, self.trainable_embedding])


def place(model: nn.Module, config: CartridgeConfig, architecture: Architecture) -> list[Placement]:
    return [PrefixKV(Cartridge(config))]


def initialize(model: Any, adapters: Mapping[str, Any], config: CartridgeConfig, batches: Iterable[Any] | None) -> None:
    """Set K and V to the model's cache for the first n tokens of the first batch's first row."""
    if batches is None:
        return
    n = config.num_virtual_tokens
    batch: Any = next(iter(batches), None)
    ids: Any = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    is_long_enough = isinstance(ids, Tensor) and ids.dim() == 2 and ids.shape[1] >= n
    actual = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
    validation.require(
        is_long_enough, f"a cartridge of {n} tokens starts from input_ids with at least {n} tokens, found {actual}"
    )
    submodules = f"num_transformer_submodules={config.num_transformer_submodules}"
    validation.require(
        config.num_transformer_submodules == 1,
        f"batches only work with decoders, found {submodules}. Start without batches",
    )
    device = next(model.parameters()).device
    cache: Any = getattr(model(input_ids=ids[:1, :n].to(device), use_cache=True), "past_key_values", None)
    no_cache = f"{type(model).__name__} returns no cache to start from. Start without batches, or choose prefix-tuning"
    validation.require(cache is not None, no_cache)
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    shape = (1, config.num_attention_heads, n)
    # Layers with a sliding window or a recurrent state cache fewer tokens.
    has_all_tokens = all(tuple(keys.shape[:3]) == shape == tuple(values.shape[:3]) for keys, values in pairs)
    validation.require(
        has_all_tokens and len(pairs) == config.num_layers,
        f"the cache of {type(model).__name__} lacks tokens or layers. Start without batches",
    )
    rows = torch.stack([torch.stack(pair) for pair in pairs])[:, :, 0]  # [layers, 2, kv_heads, n, head_dim]
    rows = rows.permute(3, 0, 1, 2, 4).flatten(1)
    for adapter in adapters.values():
        cartridges = [module for module in adapter.modules() if isinstance(module, Cartridge)]
        for cartridge in cartridges:
            cartridge.frozen_embedding.copy_(rows[: config.num_frozen_tokens])
            cartridge.trainable_embedding.data.copy_(rows[config.num_frozen_tokens :])


def write(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    """Write P as one tensor, as PEFT does."""
    if not tensors:
        return tensors, fields
    others = {name: t for name, t in tensors.items() if name not in ("frozen_embedding", "trainable_embedding")}
    rows = torch.cat([tensors["frozen_embedding"], tensors["trainable_embedding"]])
    return {**others, "prompt_embeddings": rows}, fields


def read(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    if "prompt_embeddings" not in tensors:
        return tensors, fields
    frozen, others = fields.get("num_frozen_tokens", 1), dict(tensors)
    rows = others.pop("prompt_embeddings")
    return {**others, "frozen_embedding": rows[:frozen].clone(), "trainable_embedding": rows[frozen:].clone()}, fields


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(
        peft_type="CARTRIDGE",
        tensor_name=prompt_tensor_name,
        read=read,
        write=write,
    )
    return [Method("cartridge", CartridgeConfig, place, rules, initialize, learning_rate=1e-2)]
