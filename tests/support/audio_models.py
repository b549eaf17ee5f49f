"""Tiny models that take audio and texts, of the shapes of Qwen2-Audio and Voxtral, with their processors."""

from __future__ import annotations

import base64
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch

from support import image_models

QWEN = (  # that of the model's files
    "{% set audio_count = namespace(value=0) %}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if 'audio' in content or content['type'] == 'audio' %}"
    "{% set audio_count.value = audio_count.value + 1 %}"
    "Audio {{ audio_count.value }}: <|audio_bos|><|AUDIO|><|audio_eos|>\n"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen(folder: Path) -> Any:
    """Save a Qwen2-Audio that hears one second, in up to 25 tokens; return the processor."""
    from transformers import (
        Qwen2AudioConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        WhisperFeatureExtractor,
    )

    text = image_models.tokenizer(["<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>", "<|im_start|>", "<|im_end|>"])
    processor = Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=8, chunk_length=1), text, chat_template=QWEN)
    hearing = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
    config = Qwen2AudioConfig(
        text_config={"model_type": "qwen2", **image_models.TEXT, "num_key_value_heads": 2, "vocab_size": len(text)}
        | {"pad_token_id": 0},
        audio_config={**hearing, "num_mel_bins": 8, "max_source_positions": 50},
        audio_token_index=text.convert_tokens_to_ids("<|AUDIO|>"),
    )
    torch.manual_seed(0)
    Qwen2AudioForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return processor


def voxtral(folder: Path) -> None:
    """Save a Voxtral that hears half a minute in 375 tokens, and whose tokens are bytes, without its processor's class.

    The processor is written as files, so that mistral-common need not be installed.
    """
    from transformers import VoxtralConfig, VoxtralForConditionalGeneration, WhisperFeatureExtractor

    names = (
        "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS]"
    )
    names += (
        " [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
    )
    special = [*names.split(), *(f"<SPECIAL_{i}>" for i in range(20, 40))]
    special[24:26], special[34] = ["[AUDIO]", "[BEGIN_AUDIO]"], "[TRANSCRIBE]"
    sizes = {"num_vocab_tokens": 256, "default_vocab_size": 296, "default_num_special_tokens": 40}
    mel = {"num_mel_bins": 8, "hop_length": 160, "window_size": 400}
    pieces = [base64.b64encode(bytes([i])).decode() for i in range(256)]
    tekken = {
        "config": {"pattern": r"\w+|[^\w]", "version": "v7", **sizes},
        "vocab": [{"rank": i, "token_bytes": piece, "token_str": None} for i, piece in enumerate(pieces)],
        "special_tokens": [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(special)],
        "audio": {"sampling_rate": 16_000, "frame_rate": 12.5, "audio_encoding_config": mel, "chunk_length_s": 30.0},
    }
    (folder / "tekken.json").write_text(json.dumps(tekken))
    extractor = json.loads(WhisperFeatureExtractor(feature_size=8).to_json_string())
    processor = {"processor_class": "VoxtralProcessor", "feature_extractor": extractor}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    hearing = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    heads = {"num_key_value_heads": 2, "head_dim": 8}
    config = VoxtralConfig(
        audio_config={**hearing, "num_mel_bins": 8, "max_source_positions": 1500},
        text_config={"model_type": "llama", **image_models.TEXT, **heads, "vocab_size": 296, "pad_token_id": 11},
        audio_token_id=24,
    )
    torch.manual_seed(0)
    VoxtralForConditionalGeneration(config).save_pretrained(folder)


def save_tone(path: Path, seconds: float, pitch: float = 440.0, rate: int = 16_000) -> None:
    """Write a tone as WAV."""
    values = 0.3 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((values * 32767).astype("<i2").tobytes())
