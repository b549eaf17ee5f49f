"""Write a model's hyperparameters as GGUF keys, and refuse models that llama.cpp would compute differently.

Source: llama.cpp's conversion/base.py and src/models.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.plugin import PeftcoreError
from peftcore_gguf.tensor_names import ALTERNATIVE, Family, family_of

ROPE = {  # supported keys by type
    "default": {"rope_theta"},
    "linear": {"rope_theta", "factor"},
    "yarn": {"rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"},
    "llama3": {"rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}
ROPE_FREQUENCIES = "rope_freqs.weight"
# llama.cpp recognizes models with a different attention scale by their number of layers.
LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}


def write_hyperparameters(writer: Any, model: nn.Module, rows: int) -> dict[str, Tensor]:
    """Add the keys to `writer`, and return the additional tensors that llama.cpp needs.

    Args:
        writer: the GGUF writer.
        model: the model.
        rows: size of the vocabulary.

    Raises:
        PeftcoreError: llama.cpp would compute different outputs for this model.
    """
    config: Any = model.config
    family = family_of(model)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for problem in [*_unsupported_features(config, family, head), *_unsupported_in_gemma(config, family, head)]:
        raise PeftcoreError(f"{problem}, which llama.cpp's '{family.architecture}' does not support. {ALTERNATIVE}")
    length, window = config.max_position_embeddings, getattr(config, "sliding_window", None)
    # llama.cpp gives such a model full attention, which is only equal for texts that fit into the window.
    is_limited = window and not family.full_attention_interval
    writer.add_context_length(min(length, window) if is_limited else length)
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
    if family.experts:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if family.full_attention_interval:
        writer.add_sliding_window(window)
        if config.attn_logit_softcapping is not None:
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        if config.final_logit_softcapping is not None:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
    rope = config.rope_parameters
    if "full_attention" in rope:
        sliding_rope, rope = rope["sliding_attention"], rope["full_attention"]
        _refuse_rope(sliding_rope, ("default",))
        _refuse_rope(rope, ("default", "linear"))
        writer.add_rope_freq_base_swa(sliding_rope["rope_theta"])
    return _write_rope(writer, model, rope, config.max_position_embeddings, head)


def _unsupported_features(config: Any, family: Family, head: int) -> Iterator[str]:
    """Yield the features of a model that llama.cpp does not support."""
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    types = getattr(config, "layer_types", None) or ()
    if activation != family.activation:
        yield f"the model has hidden_act={activation!r}"
    if getattr(config, "use_sliding_window", False) and "sliding_attention" in types:
        yield "some of the model's layers have a sliding window"
    if family.architecture == "qwen2" and head * config.num_attention_heads != config.hidden_size:
        yield (
            f"the model has {config.num_attention_heads} heads of {head} dimensions, which do not add up to hidden_size"
        )
    if family.experts and not config.norm_topk_prob:
        yield "the model does not normalise the weights of the top-k experts (norm_topk_prob)"


def _unsupported_in_gemma(config: Any, family: Family, head: int) -> Iterator[str]:
    interval = family.full_attention_interval
    if not interval:
        return
    types = ["sliding_attention"] * len(config.layer_types)
    for i in range(interval - 1, len(types), interval):
        types[i] = "full_attention"
    is_27b = config.num_hidden_layers == LAYERS_OF_27B[family.architecture]
    scale = config.hidden_size // config.num_attention_heads if is_27b else head
    has_softcapping = config.attn_logit_softcapping is not None
    if list(config.layer_types) != types:
        yield f"the layers with full attention are not every {interval}th layer"
    if config.query_pre_attn_scalar != scale:
        yield f"the model has query_pre_attn_scalar={config.query_pre_attn_scalar}, not {scale}"
    if config.attention_bias or getattr(config, "use_bidirectional_attention", False):
        yield "the model has attention_bias or use_bidirectional_attention"
    if has_softcapping != (family.architecture == "gemma2"):
        yield f"the model has attn_logit_softcapping={config.attn_logit_softcapping}"
    if family.architecture == "gemma2" and config.final_logit_softcapping is None:
        yield "the model has no final_logit_softcapping"


def _refuse_rope(parameters: dict[str, Any], kinds: tuple[str, ...]) -> None:
    kind = parameters.get("rope_type", "default")
    ignored_keys = {"rope_type"} | (
        {"partial_rotary_factor"} if parameters.get("partial_rotary_factor") == 1.0 else set()
    )
    unsupported_keys = (
        {key for key, value in parameters.items() if value is not None} - ignored_keys - ROPE.get(kind, set())
    )
    if unsupported_keys or kind not in kinds:
        raise PeftcoreError(f"llama.cpp does not support the model's rotary embedding {parameters}. {ALTERNATIVE}")


def _write_rope(writer: Any, model: nn.Module, parameters: dict[str, Any], length: int, head: int) -> dict[str, Tensor]:
    import gguf

    _refuse_rope(parameters, tuple(ROPE))
    kind, theta = parameters.get("rope_type", "default"), parameters["rope_theta"]
    writer.add_rope_freq_base(theta)
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(parameters["factor"])
    if kind == "yarn":
        # Keys may be None, which means transformers' default.
        original = parameters.get("original_max_position_embeddings")
        beta_fast, beta_slow = parameters.get("beta_fast"), parameters.get("beta_slow")
        writer.add_rope_scaling_orig_ctx_len(length if original is None else original)
        writer.add_rope_scaling_yarn_beta_fast(32.0 if beta_fast is None else beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(1.0 if beta_slow is None else beta_slow)
    if kind != "llama3":
        return {}
    actual = next(buffer for name, buffer in model.named_buffers() if name.endswith("rotary_emb.inv_freq"))
    default_frequencies = 1.0 / theta ** (torch.arange(0, head, 2, dtype=torch.float32) / head)
    return {ROPE_FREQUENCIES: default_frequencies / actual.float().cpu()}
