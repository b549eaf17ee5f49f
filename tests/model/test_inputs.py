"""A model takes its example inputs, whatever it reads: text, images, sound, series, or two of them."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from support import tiny
from torch import nn

import peftcore
from peftcore.model import example_inputs, inputs

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**SIZES, "image_size": 32, "patch_size": 16}
AUDIO = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "num_mel_bins": 8,
         "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_attention_heads": 4, "max_source_positions": 12,
         "vocab_size": 96, "decoder_start_token_id": 5, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
WAVE = {**SIZES, "conv_dim": (8, 8), "conv_kernel": (5, 3), "conv_stride": (4, 2), "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}  # fmt: skip
SERIES = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "prediction_length": 3, "context_length": 9}
CLIP = {"text_config": {**SIZES, "vocab_size": 96, "eos_token_id": 2}, "vision_config": VISION, "projection_dim": 8}
LLAVA = {"text_config": {**SIZES, "model_type": "llama", "vocab_size": 96}, "image_token_index": 90,
         "vision_config": {**VISION, "model_type": "clip_vision_model"}}  # fmt: skip

CASES: dict[str, tuple[Any, set[str]]] = {
    "llama": (tiny.llama, {"input_ids"}),
    "bert": (tiny.bert_classifier, {"input_ids"}),
    "t5": (tiny.t5, {"input_ids", "decoder_input_ids"}),
    "vit": (lambda: hf.ViTModel(hf.ViTConfig(**VISION)), {"pixel_values"}),
    "whisper": (lambda: hf.WhisperModel(hf.WhisperConfig(**AUDIO)), {"input_features", "decoder_input_ids"}),
    "wav2vec2": (lambda: hf.Wav2Vec2Model(hf.Wav2Vec2Config(**WAVE)), {"input_values"}),
    "clip": (lambda: hf.CLIPModel(hf.CLIPConfig(**CLIP)), {"input_ids", "pixel_values"}),
    "llava": (lambda: hf.LlavaForConditionalGeneration(hf.LlavaConfig(**LLAVA)), {"input_ids"}),
    "series": (lambda: hf.TimeSeriesTransformerModel(hf.TimeSeriesTransformerConfig(**SERIES)),
               {"past_values", "past_time_features", "past_observed_mask", "future_time_features", "future_values"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(CASES))
def test_the_model_takes_them(kind: str) -> None:
    build, names = CASES[kind]
    model = build().eval()
    call = example_inputs(model)
    assert set(call) == names
    with torch.no_grad():
        output = model(**call)[0]
    assert torch.isfinite(output).all()
    again = example_inputs(model)
    assert all(torch.equal(again[name], value) for name, value in call.items())


def test_device_dtype_and_special_tokens() -> None:
    model = CASES["clip"][0]().bfloat16()
    call = example_inputs(model, device="meta")
    assert call["pixel_values"].dtype == torch.bfloat16 and call["pixel_values"].shape == (2, 3, 32, 32)
    assert {value.device.type for value in call.values()} == {"meta"}
    tokens = example_inputs(CASES["llava"][0]())["input_ids"]
    assert tokens.max() < 96 and 90 not in tokens


def test_a_model_of_ones_own_and_a_builder_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Module):
        def forward(self, zebra: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return zebra * scale

    assert example_inputs(Own())["zebra"].dtype == torch.long  # tokens, as it has no layer
    monkeypatch.setattr(inputs, "BUILDERS", dict(inputs.BUILDERS))
    inputs.argument("zebra")(lambda facts: facts.floats(2, 3))
    assert example_inputs(Own())["zebra"].shape == (2, 3)


class Sized(NamedTuple):
    hidden_size: int
    vocab_size: int


@pytest.mark.parametrize(
    "config",
    [{"hidden_size": 24, "vocab_size": 7, 3: "x"}, Sized(24, 7), SimpleNamespace(hidden_size=24, vocab_size=7)],
)
def test_a_config_of_any_kind(config: Any) -> None:
    """Models that are not transformers' keep a dictionary or an object of their own as `config`."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = config
            self.embedding, self.linear = nn.Embedding(7, 24), nn.Linear(24, 24)

        def forward(self, input_ids: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
            return self.linear(self.embedding(input_ids) + encoder_hidden_states)

    made = example_inputs(Own())
    assert made["encoder_hidden_states"].shape == (2, 7, 24) and made["input_ids"].max() < 7
    model = peftcore.apply(Own(), "lora", target_modules=["linear"])
    assert model(**made).shape == (2, 7, 24)


@pytest.mark.parametrize("config", ["a name", 3])
def test_a_config_without_fields(config: Any) -> None:
    model = nn.Linear(4, 4)
    model.config = config
    assert example_inputs(model)["input"].shape == (2, 4)
