"""Tiny mixtures of experts with random weights, of the families that people fine-tune."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

INPUTS = {"input_ids": torch.arange(3, 21).view(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
_NAMED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": _LOCAL,
    "qwen3_moe": {**_NAMED, "decoder_sparse_step": 1},
    "gpt_oss": {**_LOCAL, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    "granitemoe": _LOCAL,
    "deepseek_v3": {**_ROUTED, **_LATENT, "num_key_value_heads": 4, "first_k_dense_replace": 1},
    "qwen3_next": {
        **_NAMED,
        **_LINEAR,
        "layer_types": ["linear_attention", "full_attention"],
        "shared_expert_intermediate_size": 32,
        "decoder_sparse_step": 1,
    },
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {**_ROUTED, "first_k_dense_replace": 1, "head_dim": 8},
    "minimax": {**_LOCAL, "head_dim": 8, "layer_types": ["full_attention", "full_attention"]},
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 64,
        "head_dim": 8,
        "moe_layers": [1],
        "attention_chunk_size": 8,
    },
    "gemma4_text": {
        **{"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32, "enable_moe_block": True},
        **{"head_dim": 8, "global_head_dim": 16, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
        **{"hidden_size_per_layer_input": 0, "sliding_window": 8},
    },
}


def mixture(kind: str, **changes: Any) -> nn.Module:
    """A model of one of `FAMILIES`, whose weights are all random and large enough to matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **FAMILIES[kind], **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return model
