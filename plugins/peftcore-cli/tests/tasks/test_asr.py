"""`--task asr`: recordings and their transcripts, learned like Trainer's own, and the word error rate."""

from __future__ import annotations

import json
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peftcore_cli.bases import models
from peftcore_cli.data import audio_files, row_reading
from peftcore_cli.settings import Settings
from peftcore_cli.tasks import asr
from peftcore_cli.tasks.registered import find
from peftcore_cli.training import trainer_arguments
from peftcore_cli.training.sampler import LengthGroupedSampler
from support.commands import Run, write_jsonl
from support.releases import BEFORE_5_24

import peftcore
from peftcore import PeftcoreError

KEPT = ("max_steps", "per_device_train_batch_size", "learning_rate", "lr_scheduler_type", "warmup_steps", "use_cpu")
KEPT += ("logging_steps", "seed", "max_grad_norm", "weight_decay", "disable_tqdm", "save_strategy", "save_steps")
TEXTS = ("good", "bad film", "it is bad", "good fun")
SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|zh|>", "<|de|>", "<|translate|>"]
SPECIAL += ["<|transcribe|>", "<|startofprev|>", "<|nocaptions|>", "<|notimestamps|>"]


def save_wave(path: Path, values: Any, *, rate: int = 16_000, channels: int = 1, width: int = 2) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(np.ascontiguousarray(values).tobytes())


@pytest.fixture(scope="session")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Whisper of random weights for two seconds, English and German."""
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration as Whisper,
        WhisperTokenizer,
    )

    folder = tmp_path_factory.mktemp("whisper")
    torch.manual_seed(0)
    letters = ["Ġ", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {token: i for i, token in enumerate([*letters, *SPECIAL])}
    tokenizer = WhisperTokenizer(vocabulary, [])
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    start, end = (tokenizer.convert_tokens_to_ids(SPECIAL[i]) for i in (1, 0))
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": len(tokenizer)}
    ends = {"pad_token_id": end, "bos_token_id": end, "eos_token_id": end, "decoder_start_token_id": start}
    more: dict[str, Any] = {"max_source_positions": 100, "num_mel_bins": 8, "max_target_positions": 24}
    model = Whisper(WhisperConfig(**sizes, **layers, **ends, **more, init_std=0.2))
    known: dict[str, Any] = {
        "is_multilingual": True,
        "no_timestamps_token_id": tokenizer.convert_tokens_to_ids("<|notimestamps|>"),
        "lang_to_id": {name: tokenizer.convert_tokens_to_ids(name) for name in ("<|en|>", "<|de|>")},
        "task_to_id": {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("translate", "transcribe")},
    }
    model.generation_config = GenerationConfig(**ends, **known)
    for part in (tokenizer, model, WhisperFeatureExtractor(feature_size=8, chunk_length=2)):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    (tmp_path / "clips").mkdir()
    rows = []
    for i, text in enumerate(TEXTS):
        times = np.arange(4000 + 800 * i) / 16_000
        save_wave(tmp_path / "clips" / f"{i}.wav", (9000 * np.sin(300 * (i + 1) * times)).astype("<i2"))
        rows.append({"audio": f"clips/{i}.wav", "text": text})
    return write_jsonl(tmp_path / "clips.jsonl", rows)


def test_samples(tmp_path: Path) -> None:
    wanted = [0.0, 0.5, -0.5, -1.0]
    kinds: dict[int, Any] = {
        1: np.array([128, 192, 64, 0], dtype=np.uint8),
        2: np.array([0, 1 << 14, -(1 << 14), -(1 << 15)], dtype="<i2"),
        3: np.array([[0, 0, 0], [0, 0, 0x40], [0, 0, 0xC0], [0, 0, 0x80]], dtype=np.uint8),
        4: np.array([0, 1 << 30, -(1 << 30), -(1 << 31)], dtype="<i4"),
    }
    for width, values in kinds.items():
        save_wave(tmp_path / "a.wav", values, width=width)
        assert audio_files.samples(str(tmp_path / "a.wav"), 16_000).tolist() == wanted
    save_wave(tmp_path / "a.wav", kinds[2], channels=2)
    assert audio_files.samples(str(tmp_path / "a.wav"), 16_000).tolist() == [0.25, -0.75]


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_other_rates_are_resampled(tmp_path: Path, rate: int) -> None:
    pytest.importorskip("soxr")
    tone = 9000 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    save_wave(tmp_path / "a.wav", np.stack([tone, tone / 3], 1).astype("<i2"), rate=rate, channels=2)
    found = audio_files.samples(str(tmp_path / "a.wav"), 16_000, longest=16_000)
    assert len(found) == 16_000 and found.dtype == np.float32
    wanted = 6000 / 32_768 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    assert np.abs(found - wanted)[200:-200].max() < 1e-4  # the ends ring
    with pytest.raises(PeftcoreError, match=r"is 1.0 seconds long, but the model reads at most 0.9"):
        audio_files.samples(str(tmp_path / "a.wav"), 16_000, longest=14_400)


def test_other_formats_are_those_of_transformers(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    pytest.importorskip("soxr")
    if BEFORE_5_24:
        pytest.importorskip("librosa")
    from transformers.audio_utils import load_audio

    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(24_000) / 48_000)
    kinds = {"a.flac": "PCM_24", "a.ogg": "VORBIS", "a.mp3": "MPEG_LAYER_III", "a.wav": "FLOAT", "b.wav": "PCM_24"}
    for name, subtype in kinds.items():
        how = {"format": "WAVEX"} if name == "b.wav" else {}  # 24 bits as ffmpeg writes them
        soundfile.write(tmp_path / name, np.stack([tone, 0 * tone], 1), 48_000, subtype=subtype, **how)
        found = audio_files.samples(str(tmp_path / name), 16_000)
        assert np.array_equal(found, load_audio(str(tmp_path / name), 16_000)[: len(found)])
        assert np.sqrt(2 * np.square(found).mean()) == pytest.approx(0.15, rel=0.02)
    soundfile.write(tmp_path / "a.wav", np.array([0, np.nan, 1]), 16_000, subtype="FLOAT")
    with pytest.raises(PeftcoreError, match="NaN or infinite"):
        audio_files.samples(str(tmp_path / "a.wav"), 16_000)


def test_wrong_recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_wave(tmp_path / "slow.wav", np.zeros(80, "<i2"), rate=8000)
    save_wave(tmp_path / "empty.wav", np.zeros(0, "<i2"))
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    save_wave(tmp_path / "cut.wav", np.zeros(800, "<i2"))
    (tmp_path / "cut.wav").write_bytes((tmp_path / "cut.wav").read_bytes()[:1000])
    (tmp_path / "a.mp3").write_bytes(b"ID3")
    for package in ("soundfile", "soxr"):
        monkeypatch.setitem(sys.modules, package, None)
    for name, message in (
        ("slow.wav", "has a sampling rate of 8,000 Hz.*pip install peftcore.audio.*ffmpeg"),
        ("empty.wav", "has no samples"),
        ("broken.wav", "cannot read '.*' as WAV: it ends too early"),
        ("cut.wav", "is truncated: the file has 478 samples, but its header says 800"),
        ("a.mp3", r"pip install peftcore\[audio\]"),
    ):
        with pytest.raises(PeftcoreError, match=message):
            audio_files.samples(str(tmp_path / name), 16_000)
    for fields, message in (
        ({"audio": "no.wav", "text": "a"}, "does not exist"),
        ({"audio": None, "text": "a"}, "must be the path of a recording, found null"),
        ({"audio": "https://a.b/c.wav", "text": "a"}, "Download the file and pass its path"),
        ({"audio": ".", "text": "a"}, "is a folder"),
        ({"audio": "slow.wav", "text": " "}, "'text' is empty"),
        ({"audio": "rows.jsonl", "text": "a"}, "has an unsupported file type"),
        ({"file": "slow.wav"}, "needs the keys audio/text.*--columns audio="),
    ):
        with pytest.raises(PeftcoreError, match=f"rows.jsonl:1: .*{message}"):
            row_reading.read_rows(write_jsonl(tmp_path / "rows.jsonl", [fields]), "asr")


def test_word_error_rate() -> None:
    assert asr.word_error_rate(["It is, good!"], ["it is good"]) == 0
    assert asr.word_error_rate(["the cat sat", ""], ["a cat sat on", "it's"]) == pytest.approx(3 / 5)
    assert asr.word_error_rate(["a b c"], ["a"]) == 2
    assert asr.word_error_rate(["IT\u2019S 'good' caf\u0065\u0301 हिन्दी"], ["it's good caf\u00e9 हिन्दी."]) == 0
    assert asr.word_error_rate(["हिन्दी"], ["हन्द"]) == 1  # marks are parts of a word


def test_languages_and_lengths(whisper: Path, clips: Path, llama: Path) -> None:
    processor, how = find("asr").load_processor(str(whisper)), models.load_generation_config(str(whisper))
    with pytest.raises(PeftcoreError, match="--language english"):
        asr.set_language(processor, None, how)
    with pytest.raises(PeftcoreError, match="does not support --language klingon"):
        asr.set_language(processor, "klingon", how)
    with pytest.raises(PeftcoreError, match="only works with multilingual models"):
        asr.set_language(processor, "english", None)
    asr.set_language(processor, "german", how)
    rows = row_reading.read_rows(clips, "asr")
    assert row_reading.guess_task([str(clips)]) == "asr"
    first = find("asr").encode(rows, processor, 64).examples[0]["labels"]
    names = processor.tokenizer.convert_ids_to_tokens(first)
    assert names == [*(SPECIAL[i] for i in (1, 4, 6, 9)), *"good", SPECIAL[0]]
    batch = find("asr").collator(processor)([{"audio": rows[0].audio, "labels": first}])
    assert batch["labels"][0].tolist() == first[1:] and batch["input_features"].shape == (1, 8, 200)
    with pytest.raises(PeftcoreError, match="transcript has 9 tokens, but the limit is 5"):
        find("asr").encode(rows, processor, 5)
    save_wave(clips.parent / "clips" / "0.wav", np.zeros(40_000, "<i2"))
    with pytest.raises(PeftcoreError, match=r"clips.jsonl:1: .*is 2.5 seconds long, but the model reads at most 2"):
        find("asr").encode(rows, processor, 64)
    with pytest.raises(PeftcoreError, match="a Whisper model"):
        find("asr").load_processor(str(llama))


@pytest.mark.nightly
def test_losses_are_those_of_transformers_trainer(clips: Path, whisper: Path, tmp_path: Path, run: Run) -> None:
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, set_seed

    options = ("--method", "lora", "--set", "r=4", "--device", "cpu", "--language", "english", "--fuse", "off")
    more = ("--steps", "3", "--batch-size", "2", "--lr", "1e-3", "--eval-data", clips, "--output", tmp_path / "run")
    run("train", "--model", whisper, "--data", clips, *options, *more)
    log = json.loads(next((tmp_path / "run" / "checkpoints").glob("*-3/trainer_state.json")).read_text())["log_history"]
    ours = [each["loss"] for each in log if "loss" in each]

    processor = find("asr").load_processor(str(whisper))
    processor.tokenizer.set_prefix_tokens(language="english", task="transcribe")
    examples = [
        {
            "audio": audio_files.samples(str(clips.parent / f"clips/{i}.wav"), 16_000),
            "labels": processor.tokenizer(text).input_ids,
        }
        for i, text in enumerate(TEXTS)
    ]
    set_seed(0)
    model = models.load_model(str(whisper), "asr", device="cpu")
    peftcore.apply(model, "lora", r=4)
    order = list(LengthGroupedSampler([len(each["labels"]) for each in examples], 2, 0))

    def collate(some: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch as Hugging Face's guide to fine-tuning Whisper does."""
        batch = processor.feature_extractor([e["audio"] for e in some], sampling_rate=16_000, return_tensors="pt")
        padded = processor.tokenizer.pad([{"input_ids": e["labels"]} for e in some], return_tensors="pt")
        labels = padded["input_ids"].masked_fill(padded["attention_mask"].ne(1), -100)
        if (labels[:, 0] == model.config.decoder_start_token_id).all():
            labels = labels[:, 1:]
        return {"input_features": batch["input_features"], "labels": labels}

    class InOrder(Seq2SeqTrainer):
        def _get_train_sampler(self, *_args: Any) -> Any:
            return order

    settings = Settings(model="m", data="d", task="asr", method="lora", steps=3, batch_size=2, lr=1e-3, device="cpu")
    arguments = Seq2SeqTrainingArguments(
        **{
            **{
                k: v
                for k, v in trainer_arguments.of_run(settings, tmp_path / "theirs", 4).to_dict().items()
                if k in KEPT
            },
            "output_dir": str(tmp_path / "theirs"),
            "report_to": "none",
            "remove_unused_columns": False,
        }
    )
    trainer = InOrder(model, arguments, train_dataset=examples, data_collator=collate)
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    theirs = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    assert ours == pytest.approx(theirs, rel=1e-4) and len(ours) == 3


KEPT = (
    "max_steps",
    "per_device_train_batch_size",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "logging_steps",
)
KEPT += ("use_cpu", "seed", "max_grad_norm", "weight_decay", "disable_tqdm", "save_strategy", "save_steps")


def test_a_step_is_predicted_with_transcripts_that_the_model_can_write(whisper: Path, llama: Path, run: Run) -> None:
    arguments = ("--task", "asr", "--method", "lora")
    said = run("plan", "-m", whisper, *arguments, "--batch-size", 2).output
    assert "a training step of WhisperForConditionalGeneration, lora, batch 2 x 24, fused operators" in said
    assert "twice the batch" in run("suggest", "-m", whisper, *arguments, "--memory", "4GB").output
    for command in ("plan", "suggest"):
        error = run(command, "-m", llama, *arguments, code=1).output
        assert "needs a Whisper model" in " ".join(error.split())


@pytest.mark.nightly
def test_training_evaluating_and_transcribing(clips: Path, whisper: Path, tmp_path: Path, run: Run) -> None:
    options = ("--method", "lora", "--set", "r=8", "--device", "cpu", "--language", "german", "--eval-data", clips)
    more = ("--steps", "4", "--lr", "1e-2", "--metric", "wer", "--load-best", "--output", tmp_path / "run")
    run("train", "-m", whisper, "--data", clips, *options, *more)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["best"]["metric"] == "wer" and result["best"]["value"] == result["after"]["wer"]
    task = json.loads((tmp_path / "run" / "adapter" / "peftcore_task.json").read_text())
    assert (task["task"], task["language"]) == ("asr", "german")
    said = run("eval", tmp_path / "run", "--data", clips).output
    assert "word error rate" in said and f"{result['after']['wer']:.4f}" in said
    run("predict", tmp_path / "run", "--data", clips, "--output", tmp_path / "texts.jsonl")
    found = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert [Path(each["audio"]).name for each in found] == ["0.wav", "1.wav", "2.wav", "3.wav"]

    # What the library itself writes.
    processor = find("asr").load_processor(str(whisper))
    model = models.load_model(str(whisper), "asr", device="cpu")
    peftcore.load(model, tmp_path / "run" / "adapter")
    inputs = asr.features([found[0]["audio"]], processor)
    generate: Any = model.generate
    tokens = generate(input_features=inputs, language="german", task="transcribe", max_new_tokens=19)
    assert found[0]["text"] == processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)[0].strip()
    assert "transcribes recordings" in run("generate", tmp_path / "run", "--prompt", "a", code=1).output
    again = (
        "train",
        "--adapter",
        tmp_path / "run",
        "--data",
        clips,
        "--eval-data",
        clips,
        "--output",
        tmp_path / "more",
    )
    run(*again, "--steps", "1", "--device", "cpu")
    assert json.loads((tmp_path / "more" / "adapter" / "peftcore_task.json").read_text())["language"] == "german"
