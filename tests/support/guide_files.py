"""Tiny models and files that stand for those that pages of the documentation name."""

import json
import wave
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    CLIPTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)


def embedder(folder: Path) -> None:
    tokenizer = _letters()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for part in (tokenizer, BertModel(BertConfig(vocab_size=len(tokenizer), **sizes))):
        part.save_pretrained(folder)


def whisper(folder: Path) -> None:
    """Save a Whisper for English and German, which reads two seconds."""
    marks = [f"<|{name}|>" for name in ("endoftext", "startoftranscript", "en", "zh", "de", "translate", "transcribe")]
    marks += [f"<|{name}|>" for name in ("startofprev", "nocaptions", "notimestamps")]
    ids = {token: i for i, token in enumerate(["Ġ", *"abcdefghijklmnopqrstuvwxyz", *marks])}
    tokenizer = WhisperTokenizer(ids, [])
    tokenizer.add_special_tokens({"additional_special_tokens": marks[1:]})
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": len(tokenizer)}
    sizes |= {"max_source_positions": 100, "num_mel_bins": 8, "max_target_positions": 32}
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), ids["<|endoftext|>"])
    tokens["decoder_start_token_id"] = ids["<|startoftranscript|>"]
    model = WhisperForConditionalGeneration(WhisperConfig(**sizes, **layers, **tokens))
    model.generation_config = GenerationConfig(
        **tokens,
        is_multilingual=True,
        no_timestamps_token_id=ids["<|notimestamps|>"],
        lang_to_id={name: ids[name] for name in ("<|en|>", "<|de|>")},
        task_to_id={name: ids[f"<|{name}|>"] for name in ("translate", "transcribe")},
    )
    for part in (tokenizer, WhisperFeatureExtractor(feature_size=8, chunk_length=2), model):
        part.save_pretrained(folder)
    Path("clips").mkdir()
    lines = []
    for i, text in enumerate(("it is good", "it is bad", "good", "bad")):
        with wave.open(f"clips/{i}.wav", "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", ""))
            file.writeframes(torch.randint(-1000, 1000, (1600,), dtype=torch.int16).numpy().tobytes())
        lines.append(json.dumps({"audio": f"clips/{i}.wav", "text": text}))
    Path("clips.jsonl").write_text("\n".join(lines))


def smolvlm(folder: Path) -> None:
    from support import image_models

    image_models.smolvlm(folder)
    Path("photos").mkdir(exist_ok=True)
    rows = []
    for i in range(4):
        Image.new("RGB", (20, 12), (200, 60 * i, 40)).save(f"photos/{i}.png")
        parts = [{"type": "image", "path": f"photos/{i}.png"}, {"type": "text", "text": "is it good"}]
        rows.append([{"role": "user", "content": parts}, {"role": "assistant", "content": "very good"}])
    for name, turns in (("photo-chats.jsonl", rows), ("photo-questions.jsonl", [row[:1] for row in rows])):
        Path(name).write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))


def stable_diffusion(folder: Path) -> None:
    from support import pipelines

    pipe = pipelines.pipeline("sd")
    size = pipe.text_encoder.config.vocab_size
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz")]
    assert len(words) <= size
    tokenizer = CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=8)
    pipe.register_modules(tokenizer=tokenizer)
    pipe.save_pretrained(folder)
    Path("images").mkdir()
    for i in range(2):
        Image.new("RGB", (20, 12), (i, 90, 200)).save(f"images/{i}.png")
        Path(f"images/{i}.txt").write_text("a b c")


def t5(folder: Path) -> None:
    tokenizer = _letters()
    sizes = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": len(tokenizer)}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    for part in (tokenizer, T5ForConditionalGeneration(T5Config(**sizes, **tokens))):
        part.save_pretrained(folder)
    rows = [{"source": f"the film is {word}", "target": f"le film est {word}"} for word in ("good", "bad")]
    Path("translations.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) * 6)


def vit(folder: Path) -> None:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=5, **sizes)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    for where in ("train/ripe", "train/rotten", "test/ripe", "test/rotten", "new"):
        Path("photos", where).mkdir(parents=True, exist_ok=True)
        for i in range(2):
            Image.new("RGB", (20, 12), (200 * ("ripe" in where), 90 * i, 40)).save(f"photos/{where}/{i}.png")


MODELS: dict[str, Callable[[Path], None]] = {
    "sentence-transformers/all-MiniLM-L6-v2": embedder,
    "google-t5/t5-small": t5,
    "google/vit-base-patch16-224-in21k": vit,
    "HuggingFaceTB/SmolVLM-256M-Instruct": smolvlm,
    "openai/whisper-tiny": whisper,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": stable_diffusion,
}


def _letters() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", *"abcdefghijklmnopqrstuvwxyz ?"])}
    letters = Tokenizer(models.BPE(vocabulary, [], unk_token="?"))
    letters.normalizer, letters.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="</s>", unk_token="?")
