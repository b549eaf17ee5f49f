"""A tiny model that takes audio and texts, of the shape of Qwen2-Audio, with its processor."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import image_models
import numpy as np
import torch

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


def save_tone(path: Path, seconds: float, pitch: float = 440.0, rate: int = 16_000) -> None:
    """Write a tone as WAV."""
    values = 0.3 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((values * 32767).astype("<i2").tobytes())
