"""A model's sizes and constants as keys of GGUF. What llama.cpp would compute in another way is refused.

Facts from llama.cpp's conversion/base.py and src/models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftcore.errors import PeftcoreError
from peftcore.exporting.gguf.names import WAY_ROUND, family_of

ROPE = {  # by kind: the keys that are understood
    "default": {"rope_theta"},
    "linear": {"rope_theta", "factor"},
    "yarn": {"rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"},
    "llama3": {"rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}
ROPE_FREQUENCIES = "rope_freqs.weight"


def write_hyperparameters(writer: Any, model: nn.Module, rows: int) -> dict[str, Tensor]:
    """Add the keys, and return tensors that llama.cpp wants beside the weights.

    Args:
        rows: of the vocabulary.

    Raises:
        PeftcoreError: the model does something that llama.cpp's of this kind does not.
    """
    config: Any = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    _refuse_other(model, config, head)
    length, window = config.max_position_embeddings, getattr(config, "sliding_window", None)
    writer.add_context_length(min(length, window) if window else length)  # within the window all is attended to
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(rows)
    return _write_rope(writer, model, config, head)


def _refuse_other(model: nn.Module, config: Any, head: int) -> None:
    def refuse(what: str) -> PeftcoreError:
        return PeftcoreError(f"{what}, which llama.cpp's '{family_of(model).architecture}' does not know. {WAY_ROUND}")

    if config.hidden_act != "silu":
        raise refuse(f"the model has hidden_act={config.hidden_act!r}")
    if getattr(config, "use_sliding_window", False) and "sliding_attention" in (
        getattr(config, "layer_types", None) or ()
    ):
        raise refuse("some of the model's layers have a sliding window")
    if family_of(model).architecture == "qwen2" and head * config.num_attention_heads != config.hidden_size:
        raise refuse(f"the model's heads have {head} dimensions, {config.num_attention_heads} of them not hidden_size")


def _write_rope(writer: Any, model: nn.Module, config: Any, head: int) -> dict[str, Tensor]:
    import gguf

    given = {key: value for key, value in config.rope_parameters.items() if value is not None}
    kind = given.pop("rope_type", "default")
    if given.get("partial_rotary_factor") == 1.0:
        del given["partial_rotary_factor"]
    if not given.keys() <= ROPE.get(kind, set()):
        raise PeftcoreError(f"the model's rotary embedding is {config.rope_parameters}, not written here. {WAY_ROUND}")
    theta = given["rope_theta"]
    writer.add_rope_freq_base(theta)
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(given["factor"])
    if kind == "yarn":
        original = given.get("original_max_position_embeddings", config.max_position_embeddings)
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_yarn_beta_fast(given.get("beta_fast", 32.0))
        writer.add_rope_scaling_yarn_beta_slow(given.get("beta_slow", 1.0))
    if kind != "llama3":
        return {}
    actual = next(buffer for name, buffer in model.named_buffers() if name.endswith("rotary_emb.inv_freq"))
    plain = 1.0 / theta ** (torch.arange(0, head, 2, dtype=torch.float32) / head)
    return {ROPE_FREQUENCIES: plain / actual.float().cpu()}
