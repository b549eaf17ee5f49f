"""`--task audio-text` with Voxtral, whose processor makes tokens of conversations by mistral-common."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peftcore_cli.bases import models
from peftcore_cli.data import row_reading
from peftcore_cli.tasks import conversations
from peftcore_cli.tasks.conversations import IGNORE_INDEX
from peftcore_cli.tasks.registered import find
from support import audio_models, image_models
from support.commands import Run, write_jsonl
from support.measured import measured

from peftcore import PeftcoreError

needs_mistral = pytest.mark.skipif(
    importlib.util.find_spec("mistral_common") is None, reason="mistral-common is not installed (make test-engines)"
)
AUDIO = 24


def heard(i: int) -> dict[str, Any]:
    return {"type": "audio", "path": f"{i}.wav"}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def asked(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


@pytest.fixture(scope="session")
def voxtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voxtral")
    audio_models.voxtral(folder)
    return folder


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Conversations with one recording, two, none, and one that is longer than what the model hears at once."""
    for i, seconds in enumerate((0.5, 1.0, 31.0)):
        audio_models.save_tone(tmp_path / f"{i}.wav", seconds, 200.0 * (i + 1))
    text = {"type": "text", "text": "is it good"}
    rows = [
        [asked(heard(0), text), said("very good")],
        [asked({"type": "text", "text": "x"}, heard(1), heard(0)), said("yes"), asked(text), said("no"), asked(text)],
        [{"role": "system", "content": "be short"}, {"role": "user", "content": "it was a film"}, said("ok")],
        [asked(heard(2)), said("long")],
    ]
    return write_jsonl(tmp_path / "chats.jsonl", [{"messages": row} for row in rows])


@needs_mistral
def test_tokens_are_mistrals_and_answers_are_learned(chats: Path, voxtral: Path) -> None:
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    processor = find("audio-text").load_processor(str(voxtral))
    examples = find("audio-text").encode(row_reading.read_rows(chats, "audio-text"), processor, 1000).examples
    assert [example["input_ids"].count(AUDIO) for example in examples] == [375, 750, 0, 750]  # of each half minute
    learned = [[label for label in example["labels"] if label != IGNORE_INDEX] for example in examples]
    texts = ["very good</s>", "yes</s>no</s>", "ok</s>", "long</s>"]
    assert [processor.tokenizer.decode(labels) for labels in learned] == texts
    theirs = MistralTokenizer.from_file(str(voxtral / "tekken.json"), mode="finetuning")
    row = [{"role": "system", "content": "be short"}, {"role": "user", "content": "it was a film"}, said("ok")]
    request = ChatCompletionRequest.from_openai(messages=row)
    assert examples[2]["input_ids"] == theirs.encode_chat_completion(request).tokens
    batch = find("audio-text").collator(processor)(examples)
    assert batch["input_features"].shape == (5, 8, 3000)
    assert batch["labels"].shape == batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"].sum(1).tolist() == [len(example["input_ids"]) for example in examples]


@needs_mistral
def test_the_loss_of_a_batch_is_that_of_its_rows(chats: Path, voxtral: Path) -> None:
    processor = find("audio-text").load_processor(str(voxtral))
    rows = row_reading.read_rows(chats, "audio-text")
    examples = find("audio-text").encode([rows[0], rows[2]], processor, 1000).examples
    model = models.load_model(str(voxtral), "audio-text", device="cpu")
    together = measured("audio-text", model, examples, processor)
    alone = [measured("audio-text", model, [example], processor) for example in examples]
    assert together.loss == pytest.approx(sum(each.loss * each.count for each in alone) / together.count, rel=1e-4)
    batch = find("audio-text").collator(processor)(examples[:1])
    quiet = {**batch, "input_features": torch.zeros_like(batch["input_features"])}
    with torch.no_grad():
        assert not torch.allclose(model(**batch).loss, model(**quiet).loss)  # the model hears


@needs_mistral
def test_what_it_does_not_take_is_an_error(chats: Path, voxtral: Path) -> None:
    processor = find("audio-text").load_processor(str(voxtral))
    system = {"role": "system", "content": "be short"}
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    for fields, message in (
        ({"messages": [system, asked(heard(0)), said("yes")]}, "mistral-common rejects .* system messages .*Change"),
        ({"messages": [said("yes"), asked(heard(0)), said("no")]}, "starts with an assistant turn"),
        ({"messages": [asked(heard(0)), said("yes")], "tools": [tool]}, "does not support tools. Remove 'tools'"),
        ({"messages": [asked(heard(0)), said("yes")]}, "has 383 tokens, 375 of them for 1 recordings, which"),
    ):
        row = row_reading.row_of(f"{chats}:1", fields, find("audio-text"))
        with pytest.raises(PeftcoreError, match=f"chats.jsonl:1: .*{message}"):
            find("audio-text").encode([row], processor, 100)
    with pytest.raises(
        PeftcoreError, match=r"--chat-template does not work with mistral-common's tokenizer, .* Remove --chat-template"
    ):
        conversations.set_template(processor, "chatml")


def test_an_error_names_the_missing_package(voxtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == "mistral_common" else own(name, *rest)  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", hidden)
    with pytest.raises(PeftcoreError, match=r"with mistral-common, but 'mistral_common' is not installed. .*\[audio\]"):
        find("audio-text").load_processor(str(voxtral))


@needs_mistral
def test_texts_are_tokens_of_transformers_where_the_folder_has_them(voxtral: Path, tmp_path: Path) -> None:
    """Where mistral-common is installed, transformers reads tekken.json first, and has no chat template then."""
    row = row_reading.row_of("x:1", {"messages": [{"role": "user", "content": "hi"}, said("yo")]}, find("causal-lm"))
    tokenizer = models.load_tokenizer(str(voxtral))
    assert tokenizer.eos_token == "</s>"
    with pytest.raises(PeftcoreError, match=r"x:1: mistral-common's tokenizer has .* Add tokenizer.json"):
        conversations.encode(row, tokenizer)
    shutil.copytree(voxtral, tmp_path, dirs_exist_ok=True)
    image_models.tokenizer([]).save_pretrained(tmp_path)
    own = models.load_tokenizer(str(tmp_path))
    conversations.set_template(own, "chatml")
    assert own.is_fast and len(conversations.encode(row, own)) == 1


@needs_mistral
@pytest.mark.filterwarnings("ignore")  # of models and trainers
def test_a_run_learns_and_answers(chats: Path, voxtral: Path, run: Run, tmp_path: Path) -> None:
    output, answers = tmp_path / "run", tmp_path / "answers.jsonl"
    given = ("-m", voxtral, "-d", chats, "--eval-data", chats, "--method", "lora", "--dtype", "fp32", "-o", output)
    run("train", *given, "--steps", "3", "--batch-size", "2", "--lr", "0.02", "--max-length", "1000")
    found = json.loads((output / "result.json").read_text())
    assert found["after"]["loss"] < found["before"]["loss"] - 0.02
    run("predict", output, "-d", chats, "-o", answers, "--answer-tokens", "2")
    assert len(answers.read_text().splitlines()) == 4
