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
    "pad_token_id": 0,
}

_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}  # 2 · hidden size
_SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "image_size": 32, "patch_size": 2}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_QK = {"num_key_value_heads": 4}  # as many as there are heads

# {config class: {field: value, or a function of the default config}}
FIELDS: dict[str, dict[str, Any]] = {
    # the state's heads make up the inner width
    "BambaConfig": {**_MAMBA, "attn_layer_indices": [1]},
    "GraniteMoeHybridConfig": {**_MAMBA, "layer_types": ["linear_attention", "full_attention"]},
    "NemotronHConfig": {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "n_routed_experts": 4},
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
    "Cosmos3EdgeTextConfig": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    "HYV4VLTextConfig": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}, **_QK},
    # keys have as many heads as queries
    "EsmcConfig": _QK,
    "Glm5NextConfig": _QK,
    "Dots3NoteTextConfig": {**_QK, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 8,
                            "swa_kv_lora_rank": 8, "swa_head_dim": 12, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
                            "swa_qk_rope_head_dim": 4, "head_dim": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8},
    "Glm4vMoeTextConfig": {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}},
    "PaddleOCRTextConfig": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    "RecurrentGemmaConfig": {"num_hidden_layers": 3},
    "GPTJConfig": {"rotary_dim": 4},
    "CodeGenConfig": {"rotary_dim": 4},
    "CohereCompassTextConfig": {"rope_parameters": {k: _ROPE for k in
                                                    ("full_attention", "sliding_attention")}},
    "LayoutLMv3Config": {"coordinate_size": 6, "shape_size": 4, "hidden_size": 32},
    "LiltConfig": {"hidden_size": 48, "num_attention_heads": 4, "channel_shrink_ratio": 4},
    "MobileBertConfig": {"intra_bottleneck_size": 32, "true_hidden_size": 32},
    "XmodConfig": {"default_language": "en_XX"},
    "HunYuanVLTextConfig": {"rope_parameters": {**_ROPE, "xdrope_section": [1, 1, 1, 1]}},
    "Glm5NextTextConfig": {**_QK, "index_kpool": 1},
    "NeoMMEConfig": {"head_dim": 16},
    "DINOv3ViTConfig": {"num_register_tokens": 4},
    "Ernie4_5_VLMoeTextConfig": {"moe_intermediate_size": [48, 24]},
    "Step3p7TextConfig": {"sliding_window": 8},
    "BltConfig": {"encoder_hash_byte_group_vocab": 64},
    "Qwen4ExpTextConfig": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16,
                           "indexer_compress_ratio": 4, "ngram_vocab_size_base": 128, "hc_lowrank": 8},
    # axes of the positions make up the hidden size
    "ReformerConfig": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16], "hidden_size": 32,
                       "attention_head_size": 8, "num_buckets": 2, "attn_layers": ["local", "lsh"], "is_decoder": False,
                       "axial_pos_embds": False, "max_position_embeddings": 512},
    # one part's size is another's
    "Apertus1p5Config": {"image_token_offset": 0, "audio_token_offset": 64},
    "FunAsrNanoAdaptorConfig": {"intermediate_size": 8},
    "Molmo2AdapterConfig": {"vision_feature_layer": [-1, -2]},
    "VitsConfig": {"upsample_initial_channel": 32},
}  # fmt: skip

# {model class: further arguments of its constructor}
ARGUMENTS: dict[str, tuple[Any, ...]] = {}


def inputs(name: str, model: Any, found: dict[str, Any]) -> dict[str, Any]:
    """What a head expects of its input beyond shapes and ranges, which no signature says."""
    if name.endswith("ForMultipleChoice"):  # two choices for each of two questions
        found = {key: value.view(1, *value.shape) for key, value in found.items()}
    if name.endswith("ForSequenceClassification") and model.config.is_encoder_decoder:  # pooled at the last eos
        found["input_ids"][:, -1] = model.config.eos_token_id
    return found


def reads_input_in_head(name: str) -> bool:
    """Whether the head looks at the caller's own tokens or mask: of questions, or the first one of several choices."""
    return name.endswith("ForMultipleChoice") or name in ("BigBirdForQuestionAnswering", "SplinterForQuestionAnswering")
