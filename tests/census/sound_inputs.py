"""What model classes expect of sound."""

from __future__ import annotations

from typing import Any

import torch

from census.changes import of
from peftcore.model.inputs import BATCH, LENGTH, Facts


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
