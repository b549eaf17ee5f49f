"""What the rules of `instances.py` cannot know, by config class or model class, with the reason."""

from __future__ import annotations

from typing import Any

# Fields that no rule may change.
UNTOUCHED = {"chunk_size_feed_forward", "pretraining_tp", "return_dict", "output_hidden_states"}

# Fields that some configs leave None, although their model cannot be built so.
MISSING: dict[str, Any] = {
    "head_dim": 8,
    "num_key_value_heads": 4,
    "vocab_size": 128,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "prediction_length": 4,
}

_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}  # 2 · hidden size
_SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "image_size": 32, "patch_size": 2}
_QK = {"num_key_value_heads": 4}  # as many as there are heads

# {config class: {field: value, or a function of the default config}}
FIELDS: dict[str, dict[str, Any]] = {
    # the state's heads make up the inner width
    "BambaConfig": _MAMBA,
    "GraniteMoeHybridConfig": _MAMBA,
    "FalconH1Config": {**_MAMBA, "mamba_d_ssm": 64},
    "Mamba2Config": {"num_heads": 4, "head_dim": 16, "n_groups": 2},
    "Zamba2Config": {"n_mamba_heads": 4, "mamba_headdim": 16},
    # heads per stage divide each stage's width
    "SwinConfig": _SWIN,
    "Swinv2Config": _SWIN,
    "DonutSwinConfig": _SWIN,
    "MaskFormerSwinConfig": _SWIN,
    # which layers are which
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4},
    "ZambaConfig": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "DoryConfig": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1, "num_hidden_layers": 4},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "Gemma4TextConfig": {"global_head_dim": 16, "hidden_size_per_layer_input": 8},
    "Gemma4UnifiedTextConfig": {"global_head_dim": 16},
    "DiffusionGemmaTextConfig": {"global_head_dim": 16},
    # the rotary parts make up half a head
    "Cosmos3EdgeTextConfig": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    "HYV4VLTextConfig": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}, **_QK},
    # keys have as many heads as queries
    "EsmcConfig": _QK,
    "Glm5NextTextConfig": _QK,
    "Glm5NextConfig": _QK,
    # axes of the positions make up the hidden size
    "ReformerConfig": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16], "hidden_size": 32,
                       "attention_head_size": 8, "num_buckets": 2, "attn_layers": ["local", "lsh"], "is_decoder": False},
    # one part's size is another's
    "Apertus1p5Config": {"image_token_offset": 0, "audio_token_offset": 128},
    "FunAsrNanoAdaptorConfig": {"intermediate_size": 8},
    "Molmo2AdapterConfig": {"vision_feature_layer": [-1, -2]},
    "VitsConfig": {"upsample_initial_channel": 32},
}  # fmt: skip

# {model class: further arguments of its constructor}
ARGUMENTS: dict[str, tuple[Any, ...]] = {}
