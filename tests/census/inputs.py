"""What a model class expects of its input beyond what its forward's signature and its config say."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peftcore.observation.inputs import BATCH, LENGTH, Facts, example_inputs

_Change = Callable[[dict[str, Any], Facts], dict[str, Any]]
_CHANGES: list[tuple[str, _Change]] = []


def inputs(name: str, model: Any) -> dict[str, Any]:
    """Keyword arguments for one small forward of the instance `model` of the class `name`."""
    facts = Facts(model, torch.device("cpu"))
    found = example_inputs(model)
    for pattern, change in _CHANGES:
        if re.fullmatch(pattern, name):
            found = change(found, facts)
    return found


def of(*names: str) -> Callable[[_Change], _Change]:
    """Register a change of the inputs of classes whose whole name one of the regular expressions matches."""

    def register(change: _Change) -> _Change:
        _CHANGES.append(("|".join(names), change))
        return change

    return register


# Text


@of(".*ForMultipleChoice")
def _two_choices(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """For each of two questions."""
    return {key: value.view(1, *value.shape) for key, value in found.items()}


@of(".*ForSequenceClassification")
def _pooled_at_the_last_eos(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    if facts.model.config.is_encoder_decoder:
        found["input_ids"][:, -1] = facts.model.config.eos_token_id
    return found


@of("LongformerForQuestionAnswering", "LongformerForMultipleChoice")
def _question_and_two_separators(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    found["input_ids"][..., [2, 3, -1]] = facts.model.config.sep_token_id
    return found


@of("SplinterForPreTraining")
def _with_a_question(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    found["input_ids"][:, 2] = facts.model.config.question_token_id
    return found


@of("Blt.*")
def _without_cache(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """Making one needs a number of layers, which the config does not have."""
    return {**found, "use_cache": False}


@of("JevForDecision")
def _one_prompt_with_two_questions(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    marks, options, kinds = torch.tensor([[3, 6]]), torch.tensor([[2, 2]]), torch.tensor([[0, 1]])
    return {"input_ids": found["input_ids"][:1], "marks": marks, "num_options": options, "question_type_ids": kinds}


@of("Bros.*")
def _with_boxes_of_eight(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {**found, "bbox": facts.floats(BATCH, LENGTH, facts.model.config.dim_bbox).abs()}


@of("TapasForQuestionAnswering")
def _cells(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """All tokens are of one cell: what is of none is masked by a number that hides the others."""
    return {**found, "token_type_ids": facts.whole(1, BATCH, LENGTH, 7)}


@of("Udop.*")
def _with_boxes_of_tokens(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {**found, "bbox": facts.floats(BATCH, LENGTH, 4).abs()}


@of("PerceiverForMaskedLM")
def _tokens_as_inputs(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {"inputs": facts.tokens(BATCH, LENGTH)}


# Images


@of("PerceiverForImageClassification.*")
def _images_as_inputs(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    size = facts.model.config.image_size if "Learned" in type(facts.model).__name__ else 224
    return {"inputs": facts.floats(BATCH, 3, size, size)}


@of("Siglip2.*")
def _patches_of_each_image(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    config = facts.model.config
    size = getattr(config, "vision_config", config).patch_size
    shapes = torch.tensor([[4, 4], [2, 3]])
    mask = torch.arange(16) < shapes.prod(-1, keepdim=True)
    patches = facts.floats(BATCH, 16, 3 * size * size)
    return {**found, "pixel_values": patches, "pixel_attention_mask": mask.long(), "spatial_shapes": shapes}


@of("LightGlueForKeypointMatching", "SuperGlueForKeypointMatching", "EfficientLoFTR.*")
def _pairs_of_images(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {"pixel_values": facts.floats(BATCH, 2, 3, 64, 64)}


@of("InstructBlip.*", "Blip2ForConditionalGeneration", "Blip2Model")
def _queries_as_tokens(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    config = facts.model.config
    video = "Video" in type(facts.model).__name__
    queries = config.num_query_tokens * (facts.find("num_frames", default=4) if video else 1)
    tokens = facts.tokens(BATCH, queries + LENGTH)
    tokens[:, :queries] = config.video_token_index if video else config.image_token_index
    return {**found, "input_ids": tokens}


@of("MllamaVisionModel")
def _tiles(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    config = facts.model.config
    pixels = facts.floats(BATCH, 1, config.max_num_tiles, 3, config.image_size, config.image_size)
    mask = torch.ones(BATCH, 1, config.max_num_tiles, dtype=torch.long)
    return {"pixel_values": pixels, "aspect_ratio_ids": facts.whole(1, BATCH, 1), "aspect_ratio_mask": mask}


@of("Pix2StructForConditionalGeneration")
def _flattened_patches(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    config = facts.model.config.vision_config
    places = torch.cartesian_prod(torch.arange(1.0, 3), torch.arange(1.0, 4)).expand(BATCH, -1, -1)
    values = facts.floats(BATCH, places.shape[1], config.patch_embed_hidden_size)
    return {**found, "flattened_patches": torch.cat([places, values], dim=-1)}


@of("Lxmert.*")
def _regions(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    config = facts.model.config
    boxes = facts.floats(BATCH, 5, config.visual_pos_dim).abs()
    return {**found, "visual_feats": facts.floats(BATCH, 5, config.visual_feat_dim), "visual_pos": boxes}


@of("InstructBlipVideo.*", "XCLIPModel")
def _frames(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    frames = facts.find("num_frames", default=4)
    return {**found, "pixel_values": found["pixel_values"][:, None].repeat(1, frames, 1, 1, 1)}


@of("Idefics.*")
def _one_image(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    if "pixel_values" not in found or facts.model.config.model_type != "idefics":
        return found
    mask = facts.whole(1, BATCH, LENGTH, 1)
    return {**found, "pixel_values": found["pixel_values"][:, None], "image_attention_mask": mask}


@of("SegGptModel")
def _prompt_masks(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """It puts the prompt over the image."""
    pixels = facts.floats(BATCH, 3, 32, 32)
    return {"pixel_values": pixels, "prompt_pixel_values": pixels.flip(0), "prompt_masks": pixels.flip(1)}


@of("Kimi_K25VisionModel")
def _patches_as_images(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    size = facts.model.config.patch_size
    return {**found, "pixel_values": facts.floats(int(found["grid_thw"].prod()), 3, size, size)}


@of("MuseGlimmerVisionModel", "MuseSparkVisionModel")
def _patches_of_two_frames(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    patches, numbers = found["pixel_values"].shape
    return {**found, "pixel_values": facts.floats(patches, facts.model.config.patch_temporal * numbers)}


@of("Inkling2VisionModel")
def _patches_of_tokens(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    config, grid = facts.model.config, torch.tensor([[1, 2, 2]])
    size = config.patch_size * config.spatial_merge_size
    return {"pixel_values": facts.floats(int(grid.prod()), size, size, 3), "image_grid_thw": grid}


@of("Gemma4VisionModel")
def _patches_at_places(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    config = facts.model.config
    side = 2 * config.pooling_kernel_size
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).expand(BATCH, -1, -1)
    return {"pixel_values": facts.floats(BATCH, side**2, 3 * config.patch_size**2), "pixel_position_ids": places}


@of("Kosmos2.*")
def _places_of_the_image(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    if "image_embeds_position_mask" not in facts.parameters:
        return found
    mask = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    mask[:, 1 : 1 + facts.model.config.latent_query_num] = 1
    return {**found, "image_embeds_position_mask": mask}


@of("TvpModel")
def _frames_of_a_clip(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {"input_ids": facts.tokens(1, LENGTH), "pixel_values": facts.floats(1, 4, 3, 64, 64)}


@of("DepthPro.*")
def _four_patches_wide(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    size = 4 * facts.model.config.patch_size
    return {"pixel_values": facts.floats(1, 3, size, size)}


@of("PPOCRV5MobileRec.*")
def _a_line_of_text(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {"pixel_values": facts.floats(BATCH, 3, 96, 160)}


@of("FlavaForPreTraining")
def _no_loss(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {**found, "return_loss": False, "input_ids_masked": found["input_ids"].flip(1)}


@of("Llama4ForConditionalGeneration")
def _as_tuple(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """Its output asks for images of the language model, which has none."""
    return {**found, "return_dict": False}


@of("Blip2ForImageTextRetrieval")
def _matched(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    mask = torch.ones_like(found["input_ids"])
    return {**found, "attention_mask": mask, "use_image_text_matching_head": True}


@of("PI0ForConditionalGeneration", "PI0Model")
def _a_robot(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    config = facts.model.config
    vision = config.vlm_config.vision_config
    images = (vision.image_size // vision.patch_size) ** 2
    tokens = facts.tokens(BATCH, images + LENGTH)
    tokens[:, :images] = config.vlm_config.image_token_id
    seen = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": facts.floats(BATCH, 1, 3, vision.image_size, vision.image_size),
        "pixel_attention_mask": torch.ones(BATCH, 1, dtype=torch.bool),
    }
    if type(facts.model).__name__ == "PI0Model":
        return {**seen, "action_embeds": facts.floats(BATCH, 1 + config.chunk_size, config.dit_config.hidden_size)}
    noise = facts.floats(BATCH, config.chunk_size, config.max_action_dim)
    return {**seen, "state": facts.floats(BATCH, config.max_state_dim), "noise": noise, "timestep": torch.rand(BATCH)}


@of("VideoLlama3VisionModel")
def _merge_sizes(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {**found, "merge_sizes": torch.tensor([2])}


@of("MiniCPM.*VisionModel")
def _target_sizes(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """Patches of all images in a row."""
    size = facts.model.config.patch_size
    pixels = facts.floats(1, 3, size, BATCH * 16 * size)
    return {"pixel_values": pixels, "target_sizes": torch.tensor([[4, 4], [2, 8]])}


@of("OneFormerModel")
def _task(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {**found, "task_inputs": facts.tokens(BATCH, facts.model.config.task_seq_len, vocabulary=100)}


@of("Molmo2.*")
def _types(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {**found, "mm_token_type_ids": facts.whole(0, BATCH, LENGTH)} if "input_ids" in found else found


# Sound


@of("MusicgenForCausalLM", "MusicgenMelodyForCausalLM", "MusicgenModel", "MusicgenMelodyModel")
def _codebooks_as_rows(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {"input_ids": facts.tokens(BATCH * facts.model.config.num_codebooks, LENGTH)}


@of("MusicgenForConditionalGeneration", "MusicgenMelodyForConditionalGeneration")
def _codebooks_of_the_decoder_as_rows(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {**found, "decoder_input_ids": facts.tokens(BATCH * facts.model.config.decoder.num_codebooks, LENGTH)}


@of("Dia.*")
def _codebooks_of_the_decoder(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    channels = facts.model.config.decoder_config.num_channels
    return {**found, "decoder_input_ids": facts.tokens(BATCH, LENGTH, channels)}


@of("OmniASR.*", "XcodecModel")
def _one_channel(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {**found, "input_values": found["input_values"].unsqueeze(1)}


@of("Moonshine.*")
def _a_wave(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {**found, "input_values": facts.floats(BATCH, 2000)}


@of("SpeechEncoderDecoderModel")
def _wave_of_the_encoder(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {"input_values": facts.floats(BATCH, 5200), "decoder_input_ids": found["decoder_input_ids"]}


@of("SpeechT5ForTextToSpeech", "SpeechT5Model")
def _spectrogram_so_far(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    config = facts.model.config
    if type(facts.model).__name__ == "SpeechT5Model":  # it has no prenets: states on both sides
        states = facts.floats(BATCH, LENGTH, config.hidden_size)
        return {"input_values": states, "decoder_input_values": states.flip(0)}
    return {**found, "decoder_input_values": facts.floats(BATCH, LENGTH, config.num_mel_bins)}


@of("GraniteSpeech5.*")
def _stacked_features(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    encoder = facts.find("encoder_config", default=facts.model.config)
    return {"input_features": facts.floats(BATCH, 64, 4 * encoder.num_mel_bins)}


@of("AudioFlamingo3Encoder")
def _mask_of_frames(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {**found, "input_features_mask": facts.whole(1, BATCH, found["input_features"].shape[-1])}


@of("ClapModel")
def _spectrogram_as_image(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {**found, "input_features": found["input_features"][:, None]}


@of("ClvpModelForConditionalGeneration")
def _voice(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {**found, "input_features": facts.floats(BATCH, 80, 64)}


@of("FastSpeech2ConformerModel", "FastSpeech2ConformerWithHifiGan")
def _spoken(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """In training it asks for what it is to say: two frames for each token."""
    per_token, bins = (BATCH, LENGTH), facts.find("num_mel_bins")
    return {
        **found,
        "spectrogram_labels": facts.floats(BATCH, 2 * LENGTH, bins),
        "duration_labels": facts.whole(2, *per_token),
        "pitch_labels": facts.floats(*per_token, 1),
        "energy_labels": facts.floats(*per_token, 1),
    }


@of("GlmAsrEncoder", "VoxtralRealtime.*")
def _bins_first(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {**found, "input_features": found["input_features"].transpose(1, 2)}


@of("Qwen3ASREncoder")
def _whole_windows(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    config = facts.model.config
    frames = 2 * config.n_window
    features = facts.floats(BATCH, config.num_mel_bins, frames)
    return {"input_features": features, "input_features_mask": facts.whole(1, BATCH, frames)}


@of("MimiDecoderModel", "PocketTTSAudioTokenizerDecoderModel")
def _latents(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {"latents": facts.floats(BATCH, facts.model.config.hidden_size, LENGTH)}


@of("Gemma3nAudioEncoder")
def _nothing_masked(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    mel = facts.floats(BATCH, 64, facts.model.config.input_feat_size)
    return {"audio_mel": mel, "audio_mel_mask": torch.zeros(BATCH, 64, dtype=torch.bool)}


@of("Gemma4AudioModel")
def _bins_of_gemma(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {**found, "input_features": facts.floats(BATCH, 64, 128)}


@of("VibeVoiceAcousticTokenizer(En|De)coderModel")
def _channels_first(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    config = facts.model.config
    decodes = "Decoder" in type(facts.model).__name__
    return {"hidden_states": facts.floats(BATCH, config.hidden_size if decodes else config.channels, 64)}


@of("Xcodec2Model", "NeuCodecModel")
def _frames_of_the_wave(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    features = found["input_features"][:, :12]
    return {**found, "input_features": features, "input_values": facts.floats(BATCH, 1, 320 * features.shape[1])}


@of("KyutaiSpeechToText.*")
def _text_and_codebooks(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {"input_ids": facts.tokens(BATCH, LENGTH, facts.model.config.num_codebooks + 1, vocabulary=100)}


@of("VoxtralRealtimeForConditionalGeneration", "VoxtralRealtimeModel")
def _sound_of_each_token(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {**found, "input_ids": facts.tokens(BATCH, LENGTH + 1)}


@of("FunAsrNanoEncoder")
def _stacked_frames(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {**found, "input_features": facts.floats(BATCH, 64, 560)}


@of("MuseSparkAudioModel")
def _whole_patches(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {"input_values": facts.floats(BATCH, 1920)}


# Others


@of("TimesFmModelForPrediction", "TimesFmModel", "TimesFm2_5.*")
def _series(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    series = facts.floats(BATCH, facts.model.config.context_length)
    if type(facts.model).__name__ == "TimesFmModel":
        freq, padding = facts.whole(0, BATCH, 1), torch.zeros(series.shape, dtype=torch.long)
        return {"past_values": series, "past_values_padding": padding, "freq": freq}
    return {"past_values": list(series) if "ForPrediction" in type(facts.model).__name__ else series}


@of("BlipForQuestionAnswering")
def _answer(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {**found, "decoder_input_ids": facts.tokens(BATCH, LENGTH)}


@of("Blip2QFormerModel")
def _states_of_an_image(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {**found, "encoder_hidden_states": facts.floats(BATCH, 5, facts.model.config.encoder_hidden_size)}


@of("MuseGlimmerAssistantModel")
def _states_of_some_layers(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    states: Tensor = found["context_hidden_states"]
    return {**found, "context_hidden_states": facts.floats(*states.shape[:2], 4 * states.shape[2])}


@of("DecisionTransformerModel")
def _an_episode(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    config, shape = facts.model.config, (BATCH, LENGTH)
    return {
        "states": facts.floats(*shape, config.state_dim),
        "actions": facts.floats(*shape, config.act_dim),
        "returns_to_go": facts.floats(*shape, 1),
        "timesteps": torch.arange(LENGTH).expand(shape),
        "attention_mask": facts.whole(1, *shape),
    }
