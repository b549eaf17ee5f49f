"""`--task audio-text`: conversations with audio, as a model's processor prepares them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peftcore_cli.bases import models
from peftcore_cli.data import audio_files, row_reading
from peftcore_cli.tasks import media_chats
from peftcore_cli.tasks.conversations import IGNORE_INDEX
from peftcore_cli.tasks.registered import find
from support import audio_models, image_models
from support.commands import Run, write_jsonl
from support.measured import measured
from support.releases import BEFORE_5_24

from peftcore import PeftcoreError

HEARD = {"type": "audio", "path": "clips/0.wav"}
SAID = {"role": "assistant", "content": "very good"}


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen_audio")
    audio_models.qwen(folder)
    return folder


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Conversations with no, one or two recordings, in several forms."""
    (tmp_path / "clips").mkdir()
    for i, seconds in enumerate((0.5, 1.0, 0.2)):
        audio_models.save_tone(tmp_path / "clips" / f"{i}.wav", seconds, 200.0 * (i + 1))
    asked: list[list[Any]] = [
        [HEARD, {"type": "text", "text": "is it good"}],
        [{"type": "text", "text": "the film"}, {"type": "audio", "audio": "clips/1.wav"}, HEARD],
        [{"type": "audio_url", "audio_url": {"url": "clips/2.wav"}}],
    ]
    rows: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": parts}, SAID]} for parts in asked]
    rows.append({"messages": [{"role": "user", "content": "it was a film"}, {"role": "assistant", "content": "no"}]})
    turns = [{"from": "human", "value": "<audio>is it"}, {"from": "gpt", "value": "good fun"}]
    rows.append({"audios": ["clips/1.wav"], "conversations": turns})
    return write_jsonl(tmp_path / "chats.jsonl", rows)


def test_rows(chats: Path) -> None:
    rows = row_reading.read_rows(chats, "audio-text")
    assert row_reading.guess_task([str(chats)]) == "audio-text"
    found = [[Path(sound).name for sound in row.sounds] for row in rows]
    assert found == [["0.wav"], ["1.wav", "0.wav"], ["2.wav"], [], ["1.wav"]]
    assert rows[1].messages is not None and rows[4].messages is not None
    place = {"type": "audio"}
    assert rows[1].messages[0]["content"] == [{"type": "text", "text": "the film"}, place, place]
    assert rows[4].messages[0]["content"] == [place, {"type": "text", "text": "is it"}]
    with pytest.raises(PeftcoreError, match=r"chats.jsonl:1: .* must be text or image.*Use --task audio-text"):
        row_reading.read_rows(chats, "image-text")


def test_tokens_are_those_of_the_processor_and_answers_are_learned(chats: Path, qwen: Path) -> None:
    processor = find("audio-text").load_processor(str(qwen))
    rows = row_reading.read_rows(chats, "audio-text")
    examples = find("audio-text").encode(rows, processor, 400).examples
    place, counts = processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>"), []
    for row, example in zip(rows, examples, strict=True):
        sounds = [audio_files.samples(path, 16_000) for path in row.sounds]
        text = processor.tokenizer.apply_chat_template(row.messages, tokenize=False)
        theirs = processor(text=text, audio=sounds or None, sampling_rate=16_000)["input_ids"][0]
        assert example["input_ids"] == list(theirs)
        learned = [id_ for id_, label in zip(theirs, example["labels"], strict=True) if label != IGNORE_INDEX]
        assert place not in learned and len(learned) == len(example["input_ids"]) - example["labels"].count(
            IGNORE_INDEX
        )
        counts.append(list(theirs).count(place))
    assert counts == [12, 37, 5, 0, 25]  # half a second is heard as 12 tokens, and a second as 25
    batch = find("audio-text").collator(processor)(examples)
    assert batch["input_features"].shape == (5, 8, 100) and batch["feature_attention_mask"].shape == (5, 100)
    assert batch["labels"].shape == batch["input_ids"].shape
    model = models.load_model(str(qwen), "audio-text", device="cpu")
    together = measured("audio-text", model, examples, processor)
    alone = [measured("audio-text", model, [example], processor) for example in examples]
    assert together.loss == pytest.approx(sum(each.loss * each.count for each in alone) / together.count, rel=1e-4)
    quiet = {**batch, "input_features": torch.zeros_like(batch["input_features"])}
    with torch.no_grad():
        assert not torch.allclose(model(**batch).loss, model(**quiet).loss)  # the model hears


@pytest.mark.skipif(BEFORE_5_24, reason="refused: Gemma3nProcessor lacks audio in its template")
def test_gemmas_recordings_take_a_fixed_number_of_tokens(chats: Path) -> None:
    """Gemma 3n writes line ends around a recording, which are tokens of their own or join those of the text."""
    from transformers import Gemma3nAudioFeatureExtractor, Gemma3nProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    names |= {"audio_token": "<audio_soft_token>", "boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>"}
    turns = {"begin_of_turn": "<start_of_turn>", "end_of_turn": "<end_of_turn>"}
    text = image_models.tokenizer([], extra_special_tokens={**names, **turns})
    text.add_tokens(["\n", "\n\n", "\n\n\n"])
    template = image_models.GEMMA.replace(
        "{% elif 'text' in content %}",
        "{% elif content['type'] == 'audio' %}<audio_soft_token>{% elif 'text' in content %}",
    )
    extractor, images = Gemma3nAudioFeatureExtractor(), SiglipImageProcessorPil(size={"height": 8, "width": 8})
    processor = Gemma3nProcessor(extractor, images, text, template, audio_seq_length=3, image_seq_length=2)
    processor = media_chats.check_processor(processor, "gemma", hears=True)
    rows = row_reading.read_rows(chats, "audio-text")
    examples = find("audio-text").encode(rows, processor, 400).examples
    place = text.convert_tokens_to_ids("<audio_soft_token>")
    assert [example["input_ids"].count(place) for example in examples] == [3, 6, 3, 0, 3]
    batch = find("audio-text").collator(processor)(examples)
    assert len(batch["input_features"]) == 5 and batch["labels"].shape == batch["input_ids"].shape


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": [{"role": "user", "content": [{**HEARD, "path": "no.wav"}]}, SAID]}, "'.*no.wav' does not exist"),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}, SAID]},
            "refers to recording 1, but the row lists",
        ),
        (
            {"audio": "clips/0.wav", "messages": [{"role": "user", "content": "is it"}, SAID]},
            "1 recordings, .* refer to 0",
        ),
        (
            {"messages": [{"role": "user", "content": [HEARD]}, {"role": "assistant", "content": [HEARD]}]},
            "assistant turn with an image",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}, SAID]}, "must be text, image or audio"),
        ({"messages": [{"role": "user", "content": [{**HEARD, "path": "https://a.b/c.wav"}]}, SAID]}, "Download"),
    ],
)
def test_wrong_rows(chats: Path, fields: dict[str, Any], message: str) -> None:
    write_jsonl(chats, [fields])
    with pytest.raises(PeftcoreError, match=f"chats.jsonl:1: .*{message}"):
        row_reading.read_rows(chats, "audio-text")


def test_what_does_not_fit_is_an_error(chats: Path, qwen: Path, llama: Path, tmp_path: Path) -> None:
    processor = find("audio-text").load_processor(str(qwen))
    rows = row_reading.read_rows(chats, "audio-text")
    with pytest.raises(PeftcoreError, match=r"tokens \(12 for 1 recordings\) and cannot be truncated"):
        find("audio-text").encode(rows, processor, 8)
    audio_models.save_tone(tmp_path / "clips/0.wav", 1.5)
    with pytest.raises(PeftcoreError, match=r"chats.jsonl:1: .* is 1.5 seconds long, but the model reads at most 1"):
        find("audio-text").encode(rows, processor, 400)
    row = {"images": ["a.png"], "messages": [{"role": "user", "content": "<image>"}, SAID]}
    (tmp_path / "a.png").touch()
    with pytest.raises(PeftcoreError, match="Qwen2AudioProcessor does not support images"):
        find("audio-text").encode([row_reading.row_of(f"{chats}:1", row, find("audio-text"))], processor, 400)
    with pytest.raises(PeftcoreError, match="needs a model that takes audio and text, such as Qwen2-Audio"):
        find("audio-text").load_processor(str(llama))


@pytest.mark.filterwarnings("ignore")  # of models and trainers
def test_a_run_learns_what_is_heard(chats: Path, qwen: Path, run: Run, tmp_path: Path) -> None:
    output = tmp_path / "run"
    given = ("-m", qwen, "-d", chats, "--eval-data", chats, "--method", "lora", "--dtype", "fp32", "-o", output)
    shown = run("train", *given, "--steps", "4", "--batch-size", "2", "--lr", "0.02", "--max-length", "100").output
    assert "peftcore predict" in shown and "peftcore chat" not in shown and "generate" not in shown
    found = json.loads((output / "result.json").read_text())
    assert json.loads((output / "run.json").read_text())["task"] == "audio-text"
    assert found["after"]["loss"] < found["before"]["loss"] - 0.05
    assert f"{found['after']['loss']:.4f}" in run("eval", output, "-d", chats).output
    answers = tmp_path / "answers.jsonl"
    run("predict", output, "-d", chats, "-o", answers, "--answer-tokens", "4")
    assert len(answers.read_text().splitlines()) == 5
    assert "Use peftcore predict" in run("generate", output, "--prompt", "the film", code=1).output
