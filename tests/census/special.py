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
_SWIN = {"embed_dim": 16, "depths": [1] * 4, "num_heads": [2] * 4, "window_size": 4, "image_size": 64, "patch_size": 2}
_EFFICIENT = {
    "in_channels": [32, 16],
    "out_channels": [16, 16],
    "kernel_sizes": [3, 3],
    "strides": [1, 2],
    "num_block_repeats": [1, 1],
    "expand_ratios": [1, 2],
    "depthwise_padding": [],
    "hidden_dim": 2560,
}
_HALVING = {
    "out_indices": [1, 2, 3, 4],
    "block_configs": [
        [[3, 96, 96, 1, True]],
        [[3, 96, 96, 2, False]],
        [[3, 96, 192, 2, False]],
        [[3, 192, 384, 2, True]],
    ],
}
_RATIOS = (("long", 7), ("mid", 5), ("short", 3))
_PYRAMID = [[16, 16], [8, 8], [4, 4]]
_TIMM_VIT = {
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "img_size": 64,
    "patch_size": 16,
    "global_pool": "",
    "use_post_transformer_norm": False,
    "ref_feat_shape": [4, 4],
    "init_values": 0.1,
}
_POST_CONV = {"post_conv_in_channels": 32, "post_conv_mid_channels": 32, "post_conv_out_channels": 32}
_SMALL_CODEC = {"num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]}
_LONG_AND_SHORT = {
    "neck_out_channels": 32,
    "scale_factor_list": [1, 2, 4, 8],
    "kernel_list": [3, 2, 2],
    "intraclass_block_number": 4,
    "intraclass_block_config": {
        "reduce_channel": [1, 1, 0],
        "return_channel": [1, 1, 0],
        **{f"vertical_long_to_small_conv_{size}ratio": [[k, 1], [1, 1], [k // 2, 0]] for size, k in _RATIOS},
        **{f"horizontal_small_to_long_conv_{size}ratio": [[1, k], [1, 1], [0, k // 2]] for size, k in _RATIOS},
        **{f"symmetric_conv_long_{size}ratio": [[k, k], [1, 1], [k // 2, k // 2]] for size, k in _RATIOS},
    },
}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_QK = {"num_key_value_heads": 4}  # as many as there are heads


def _image_tokens(name: str) -> dict[str, int]:
    """Tokens of 32 codes, whose names have digits, or letters in Chameleon's."""
    digits = "ABCDEFGHIJ" if name.endswith("Z") else "0123456789"
    codes = {name.format(digits[i // 10], digits[i % 10]): 64 + i for i in range(32)}
    return {"<image>": 100, "<|extra_200|>": 101, **codes}


# {config class: {field: value, a function of the default config, or such a dict for a sub-config}}
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
    "ZambaConfig": {"num_hidden_layers": 5, "attention_hidden_size": 64, "attention_head_dim": 16,
                    "layers_block_type": [*["linear_attention"] * 2, "hybrid", "linear_attention", "hybrid"]},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "DoryConfig": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1, "num_hidden_layers": 4},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "Gemma4TextConfig": {"global_head_dim": 16, "hidden_size_per_layer_input": 8},
    "Gemma4UnifiedTextConfig": {"global_head_dim": 16},
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
    "Ernie4_5_VLMoeTextConfig": {"moe_intermediate_size": [48, 24],
                                 "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}},
    "Step3p7TextConfig": {"sliding_window": 8},
    "BltConfig": {"encoder_hash_byte_group_vocab": 64},
    "Qwen4ExpTextConfig": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16,
                           "indexer_compress_ratio": 4, "ngram_vocab_size_base": 128, "hc_lowrank": 8},
    # queries of 64 numbers at least
    "xLSTMConfig": {"hidden_size": 128, "embedding_dim": 128},
    # axes of the positions make up the hidden size
    "ReformerConfig": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16], "hidden_size": 32,
                       "attention_head_size": 8, "num_buckets": 2, "attn_layers": ["local", "lsh"], "is_decoder": False,
                       "axial_pos_embds": False, "max_position_embeddings": 512},
    # one part's size is another's
    "Apertus1p5Config": {"image_token_offset": 0, "audio_token_offset": 64},
    "Apertus1p5VisionTokenizerConfig": {"codebook_size": 64},
    "WavTokenizerEncoderConfig": {"codebook_size": 64},
    "LongcatFlashConfig": {"qk_head_dim": 16},
    "TextNetConfig": {"stem_out_channels": 8},
    "Sapiens2Config": {"num_key_value_heads_per_layer": [4, 2]},
    "Sapiens2HeadConfig": {"upsample_out_channels": [16], "upsample_kernel_sizes": [4], "conv_out_channels": [8],
                           "conv_kernel_sizes": [1], "scale_conv_out_channels": [8], "scale_conv_kernel_sizes": [1],
                           "scale_final_input_size": 32, "scale_final_hidden_sizes": [8, 4]},
    "DbrxAttentionConfig": {"rope_theta": 1e4, "clip_qkv": 8.0},
    "GraniteSpeech5EncoderConfig": _QK,
    "MoonshineConfig": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "CHMv2Config": {"backbone_config": {"return_class_token": True}},
    "DepthProConfig": {"patch_size": 56, "intermediate_hook_ids": [1, 0], "intermediate_feature_dims": [16, 16],
                       "scaled_images_feature_dims": [32, 32, 16],
                       **{f"{name}_model_config": {"image_size": 56} for name in ("image", "patch", "fov")}},
    "MllamaVisionConfig": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 96},
    "InklingVisionConfig": {"patch_size": 4, "num_hidden_layers": 3},
    "RadioConfig": {"video_temporal_patch_size": 2, "video_patch_dim": 1536},
    "PPFormulaNetVisionConfig": _POST_CONV,
    "SLANeXtConfig": _POST_CONV,
    "Sam2HieraDetConfig": {"hidden_size": 8},
    "Sam2VisionConfig": {"backbone_channel_list": [64, 48, 24, 8], "backbone_feature_sizes": _PYRAMID},
    "Sam3VisionConfig": {"backbone_feature_sizes": _PYRAMID},
    "VibeVoiceAcousticTokenizerEncoderConfig": _SMALL_CODEC,
    "VibeVoiceAcousticTokenizerDecoderConfig": _SMALL_CODEC,
    "VibeVoiceSemanticTokenizerEncoderConfig": _SMALL_CODEC,
    "LwDetrConfig": {"projector_scale_factors": [1.0]},
    "PPDocLayoutV2Config": {"class_thresholds": [0.5] * 25, "class_order": list(range(25))},
    "PPDocLayoutV3Config": {"x4_feat_dim": 16},
    "PPOCRV5ServerDetConfig": _LONG_AND_SHORT,
    "PPOCRV6MediumDetConfig": {**_LONG_AND_SHORT, "backbone_config": _HALVING},
    "PPOCRV6SmallDetConfig": {"layer_list_out_channels": [96, 96, 192, 384], "backbone_config": _HALVING},
    "XcodecConfig": {"codebook_dim": 544},
    "NeuCodecConfig": {"quantization_dim": 64, **_QK},
    "Xcodec2Config": {"quantization_dim": 64, **_QK},
    "NemotronH_Omni_Reasoning_V3_Config": {"image_token_id": 100, "video_token_id": 101, "audio_token_id": 102},
    "Nemotron3_5AsrConfig": {"num_prompts": 8, "default_prompt_id": 5},
    "FastSpeech2ConformerConfig": {"speaking_speed": 1e-6},  # else changed layers make speech of hours
    "BrosConfig": {"hidden_size": 64},
    "AutoformerConfig": {"label_length": 2},
    "ClapAudioConfig": {"patch_embeds_hidden_size": 8, "hidden_size": 64},
    "ClvpEncoderConfig": {"hidden_size": 128, "vocab_size": 8194},  # reads what the decoder generates
    "Gemma4AudioConfig": {"subsampling_conv_channels": [128, 8]},
    "T5Gemma2TextConfig": {"dropout_rate": 0.0},
    "SegGptConfig": {"image_size": [64, 32]},
    "TvpConfig": {"visual_prompt_size": 8, "num_frames": 4},
    "UVDocConfig": {"backbone_config": {"out_indices": [1, 2, 3, 4, 5, 6]}},
    "Kosmos2Config": {"latent_query_num": 4},
    "TimesFmConfig": {"context_length": 64, "horizon_length": 8},
    "TimesFm2_5Config": {"context_length": 64, "horizon_length": 8, "output_quantile_len": 16},
    # images are few tokens
    "Gemma3Config": {"mm_tokens_per_image": 4, "image_token_index": 100},
    "T5Gemma2EncoderConfig": {"mm_tokens_per_image": 4, "image_token_index": 100},
    "T5Gemma2Config": {"image_token_index": 100},
    "LlavaNextConfig": {"image_grid_pinpoints": [[64, 64]]},
    "LlavaNextVideoConfig": {"image_grid_pinpoints": [[64, 64]]},
    "LlavaOnevisionConfig": {"image_grid_pinpoints": [[64, 64]]},
    "AriaConfig": {"projector_patch_to_query_dict": {"4": 2}},
    "ChameleonVQVAEConfig": {"num_embeddings": 32},
    "Emu3VQVAEConfig": {"codebook_size": 32, "hidden_size": 128},
    "PPOCRV5MobileRecConfig": {"head_out_channels": 8},
    "PI0Config": {"chunk_size": 4, "max_state_dim": 8, "max_action_dim": 8},
    "DPTConfig": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "CvtConfig": {"depth": [1, 2, 3]},
    "EomtConfig": {"num_blocks": 1},
    "EomtDinov3Config": {"num_blocks": 1},
    "ZoeDepthConfig": {"bottleneck_features": 32},
    # models of timm by name
    "TimmBackboneConfig": {"backbone": "test_resnet", "out_indices": [1, 2, 3, 4]},
    **{f"{name}Config": {"backbone_config": {"out_indices": [4]}}
       for name in ("ConditionalDetr", "DabDetr", "Detr", "TableTransformer")},
    "DeformableDetrConfig": {"backbone_config": {"out_indices": [2, 3, 4]}},
    "TimmWrapperConfig": {"architecture": "test_vit", "model_args": {"depth": 2, "img_size": 64}},
    "PerceptionLMConfig": {"vision_config": {"architecture": "vit_pe_core_tiny_patch16_384", "model_args": _TIMM_VIT},
                           "image_token_id": 100, "video_token_id": 101},
    "EfficientNetConfig": _EFFICIENT,
    "AlignVisionConfig": _EFFICIENT,
    "PerceiverConfig": {"num_cross_attention_heads": 1, "num_self_attends_per_block": 2},
    "Siglip2VisionConfig": {"num_patches": 16},
    "Llama4VisionConfig": {"intermediate_size": 128},
    "PPLCNetV4Config": {"stem_channels": [3, 48, 96]},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse"]},
    "DiffusionGemmaTextConfig": {"global_head_dim": 16, "num_experts": 4, "top_k_experts": 2,
                                 "moe_intermediate_size": 16},
    "Dots3NoteAudioConfig": {"adapter_input_size": 32},
    "Granite4VisionConfig": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2", "spatial_target_layers": [1],
                             "image_token_index": 100, "vision_config": {"hidden_size": 64},
                             "image_grid_pinpoints": [[64, 64]]},
    "SuperPointConfig": {"keypoint_decoder_dim": 65},
    "EfficientLoFTRConfig": {"out_features": [8, 8, 16, 32], "num_attention_heads": 8, "fine_matching_slice_dim": 4},
    "HieraConfig": {"decoder_hidden_size": 32, "decoder_depth": 1, "decoder_num_heads": 2},
    "FastSpeech2ConformerHifiGanConfig": {"model_in_dim": 80},
    "BridgeTowerConfig": {"hidden_size": 64},
    "BridgeTowerTextConfig": {"hidden_size": 64},
    "BridgeTowerVisionConfig": {"hidden_size": 64},
    "UnivNetConfig": {"kernel_predictor_hidden_channels": 64},
    "MoonshineStreamingConfig": {"num_key_value_heads": 4},
    "VibeVoiceAcousticTokenizerConfig": _SMALL_CODEC,
    "MimiConfig": {"num_filters": 4, "vector_quantization_hidden_dimension": 32},
    "Blip2Config": {"image_token_index": 100},
    "InstructBlipConfig": {"image_token_index": 100},
    "InstructBlipVideoConfig": {"video_token_index": 100},
    "VoxtralConfig": {"audio_token_id": 100},
    "ChameleonConfig": {"vocabulary_map": _image_tokens("IMGIMG{}{}Z")},
    "Emu3Config": {"vocabulary_map": _image_tokens("<|visual token 0000{}{}|>")},
    "NemotronAsrStreamingConfig": {},
    "FunAsrNanoAdaptorConfig": {"intermediate_size": 8},
    "Molmo2AdapterConfig": {"vision_feature_layer": [-1, -2]},
    "VitsConfig": {"upsample_initial_channel": 32, "speaking_rate": 1e4},  # else changed biases make speech of hours
}  # fmt: skip

_STAGES = {"num_hidden_layers": 4, "out_indices": [0, 1, 2, 3]}

# {model class: the same}
CLASS_FIELDS: dict[str, dict[str, Any]] = {
    "ReformerModelWithLMHead": {"is_decoder": True},
    "Blip2ForImageTextRetrieval": {"qformer_config": {"use_qformer_text_input": True}},
    "ShieldGemma2ForImageClassification": {"yes_token_index": 5, "no_token_index": 6},
    "BeitForSemanticSegmentation": _STAGES,
    "Data2VecVisionForSemanticSegmentation": _STAGES,
}

# {config class: a function that gives arguments without which it is no valid one}
DEFAULTS: dict[str, Any] = {"Gemma4Config": lambda: {"vision_config": {}}}

# {model class: further arguments of its constructor}
ARGUMENTS: dict[str, tuple[Any, ...]] = {}


def reads_input_in_head(name: str) -> bool:
    """Whether the head looks at the caller's own tokens or mask: of questions, or the first one of several choices."""
    others = ("BigBirdForQuestionAnswering", "SplinterForQuestionAnswering", "SplinterForPreTraining")
    return name.endswith("ForMultipleChoice") or name in others
