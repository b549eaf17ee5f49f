"""`--task image-text`: conversations with images, as processors prepare them, learned like Trainer's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peftcore_cli.bases import models
from peftcore_cli.bases.adapter_folders import AdapterTask
from peftcore_cli.data import row_reading
from peftcore_cli.settings import Settings
from peftcore_cli.tasks import media_chats
from peftcore_cli.tasks.conversations import IGNORE_INDEX
from peftcore_cli.tasks.registered import find
from peftcore_cli.training import trainer_arguments
from peftcore_cli.training.sampler import LengthGroupedSampler
from PIL import Image
from support import image_models
from support.commands import Run, write_jsonl
from support.measured import measured

import peftcore
from peftcore import PeftcoreError

Made = tuple[Path, Any]  # folder of a model, and its processor
SHOWN = {"type": "image", "path": "photos/1.png"}
SAID = {"role": "assistant", "content": "very good"}


@pytest.fixture(scope="session")
def smolvlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smolvlm")
    image_models.smolvlm(folder)
    return folder


@pytest.fixture(
    params=[
        pytest.param(kind, marks=[] if kind in ("smolvlm", "gemma") else pytest.mark.nightly)
        for kind in image_models.KINDS
    ]
)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Made:
    """A model of each kind and its processor."""
    processor = image_models.KINDS[request.param](tmp_path / request.param)
    return tmp_path / request.param, media_chats.check_processor(processor, request.param)


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Conversations with no, one or two images, in several forms."""
    (tmp_path / "photos").mkdir()
    for i, size in enumerate(((20, 30), (8, 8), (24, 10))):
        Image.new("RGB", size, (60 * i, 200, 20)).save(tmp_path / "photos" / f"{i}.png")
    asked: list[list[Any]] = [
        [SHOWN, {"type": "text", "text": "is it good"}],
        [{"type": "text", "text": "the film"}, {"type": "image", "image": "photos/0.png"}, SHOWN],
        [{"type": "image_url", "image_url": {"url": "photos/2.png"}}, {"type": "text", "text": "is it bad"}],
    ]
    rows: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": parts}, SAID]} for parts in asked]
    rows.append({"messages": [{"role": "user", "content": "it was a film"}, {"role": "assistant", "content": "no"}]})
    turns = [{"from": "human", "value": "<image>\nis it"}, {"from": "gpt", "value": "good fun"}]
    rows.append({"image": "photos/2.png", "conversations": turns})
    more = [*turns, {"from": "human", "value": "is it dull <image>"}, {"from": "gpt", "value": "not very"}]
    rows.append({"images": ["photos/0.png", "photos/1.png"], "conversations": more})
    return write_jsonl(tmp_path / "chats.jsonl", rows)


def test_rows(chats: Path) -> None:
    rows = row_reading.read_rows(chats, "image-text")
    assert row_reading.guess_task([str(chats)]) == "image-text"
    assert [[Path(image).name for image in row.images] for row in rows] == [
        ["1.png"],
        ["0.png", "1.png"],
        ["2.png"],
        [],
        ["2.png"],
        ["0.png", "1.png"],
    ]
    place = {"type": "image"}
    assert rows[1].messages is not None and rows[5].messages is not None
    assert rows[1].messages[0]["content"] == [{"type": "text", "text": "the film"}, place, place]
    assert rows[5].messages[2]["content"] == [{"type": "text", "text": "is it dull "}, place]


def test_tokens_are_those_of_the_processor_and_answers_are_learned(chats: Path, made: Made) -> None:
    _, processor = made
    rows = row_reading.read_rows(chats, "image-text")
    examples = find("image-text").encode(rows, processor, 400).examples
    place = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    for row, example in zip(rows, examples, strict=True):
        # what the processor itself makes of the messages, with the images in their places
        images = iter(row.images)
        messages = [
            {**m, "content": [{**p, "path": next(images)} if p["type"] == "image" else p for p in m["content"]]}
            for m in row.messages or []
        ]
        theirs = processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"][0]
        ours = example["input_ids"]
        assert ours[: len(theirs)] == list(theirs) and len(ours) - len(theirs) in (0, 1)
        learned = [id_ for id_, label in zip(ours, example["labels"], strict=True) if label != IGNORE_INDEX]
        assert place not in learned
        said = processor.tokenizer.decode(learned, skip_special_tokens=True).split()
        answers = [part["text"] for m in row.messages or [] if m["role"] == "assistant" for part in m["content"]]
        assert " ".join(said) == " ".join(answers)
    batch = find("image-text").collator(processor)(examples)
    assert batch["labels"].shape == batch["input_ids"].shape == batch["attention_mask"].shape
    assert (batch["labels"] != IGNORE_INDEX).sum() == sum(
        label != IGNORE_INDEX for e in examples for label in e["labels"]
    )


@pytest.mark.nightly
def test_the_loss_of_a_batch_is_that_of_its_examples(chats: Path, made: Made) -> None:
    folder, processor = made
    model = models.load_model(str(folder), "image-text", device="cpu")
    examples = find("image-text").encode(row_reading.read_rows(chats, "image-text"), processor, 400).examples
    together = measured("image-text", model, examples, processor)
    alone = [measured("image-text", model, [example], processor) for example in examples]
    assert together.count == sum(each.count for each in alone)
    assert together.loss == pytest.approx(sum(each.loss * each.count for each in alone) / together.count, rel=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image", "path": "no.png"}]}, SAID]}, "does not exist"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "https://a.b/c.png"}]}, SAID]},
            "Download the image",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, SAID]},
            "refers to image 1, but the row lists 0",
        ),
        (
            {"images": ["photos/1.png"], "messages": [{"role": "user", "content": "is it"}, SAID]},
            "lists 1 images, but its turns refer to 0",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "audio", "path": "a"}]}, SAID]}, "must be text or image"),
        ({"messages": [{"role": "user", "content": [SHOWN]}, {"role": "assistant", "content": [SHOWN]}]}, "assistant"),
        (
            {"images": [{"bytes": "PNG"}], "messages": [{"role": "user", "content": "<image>"}, SAID]},
            "must be the path of a file",
        ),
    ],
)
def test_wrong_rows(chats: Path, fields: dict[str, Any], message: str) -> None:
    write_jsonl(chats, [fields])
    with pytest.raises(PeftcoreError, match=f"chats.jsonl:1: .*{message}"):
        row_reading.read_rows(chats, "image-text")


@pytest.mark.nightly
def test_wrong_images_models_and_lengths(chats: Path, smolvlm: Path, llama: Path, run: Run) -> None:
    processor = find("image-text").load_processor(str(smolvlm))
    rows = row_reading.read_rows(chats, "image-text")
    with pytest.raises(PeftcoreError, match=r"chats.jsonl:2: the conversation has .* and cannot be truncated"):
        find("image-text").encode(rows, processor, 50)
    (chats.parent / "photos" / "1.png").write_bytes(b"\x89PNG")
    with pytest.raises(PeftcoreError, match=r"chats.jsonl:1: cannot read the image '.*1.png'"):
        find("image-text").encode(rows, processor, 400)
    arguments = ("--data", chats, "--method", "lora", "--output", chats.parent / "run")
    said = run("train", "--model", llama, *arguments, code=1)
    assert "needs a model that takes images and text" in said.output.replace("\n", " ")
    with pytest.raises(PeftcoreError, match="Use --task image-text"):
        row_reading.read_rows(chats, "causal-lm")


def test_a_model_without_a_processor_of_images(chats: Path, smolvlm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((smolvlm / name).read_bytes())
    with pytest.raises(PeftcoreError, match=r"processor"):
        find("image-text").load_processor(str(folder))


@pytest.mark.nightly
def test_a_template_without_images(chats: Path, smolvlm: Path) -> None:
    processor = find("image-text").load_processor(str(smolvlm))
    processor.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}{{ p.get('text', '') }}{% endfor %}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(PeftcoreError, match="writes 0 images, but the conversation has 1"):
        find("image-text").encode(row_reading.read_rows(chats, "image-text"), processor, 400)


@pytest.mark.nightly
def test_losses_are_those_of_transformers_trainer(chats: Path, smolvlm: Path, tmp_path: Path, run: Run) -> None:
    """Training by the command, and by Trainer on batches of the processor with the same labels."""
    from transformers import Trainer, set_seed

    options = ("--method", "lora", "--set", "r=4", "--device", "cpu", "--max-length", "200", "--fuse", "off")
    more = ("--steps", "3", "--batch-size", "2", "--lr", "1e-3", "--eval-data", chats)
    run("train", "--model", smolvlm, "--data", chats, *options, *more, "--output", tmp_path / "run")
    log = json.loads(next((tmp_path / "run" / "checkpoints").glob("*-3/trainer_state.json")).read_text())["log_history"]
    ours = [each["loss"] for each in log if "loss" in each]

    processor = find("image-text").load_processor(str(smolvlm))
    examples = find("image-text").encode(row_reading.read_rows(chats, "image-text"), processor, 200).examples
    set_seed(0)
    model = models.load_model(str(smolvlm), "image-text", device="cpu")
    peftcore.apply(model, "lora", r=4)
    settings = Settings(
        model="m",
        data="d",
        task="image-text",
        method="lora",
        steps=3,
        batch_size=2,
        lr=1e-3,
        device="cpu",
        max_length=200,
    )
    order = list(LengthGroupedSampler([len(each["input_ids"]) for each in examples], 2, 0))
    place = processor.tokenizer.convert_tokens_to_ids(processor.image_token)

    def batch(some: list[dict[str, Any]]) -> dict[str, Any]:
        images = [[Image.open(path) for path in each["images"]] for each in some]
        found = processor(text=[e["text"] for e in some], images=images, padding=True, return_tensors="pt")
        labels = torch.full_like(found["input_ids"], IGNORE_INDEX)
        for row, each in enumerate(some):
            labels[row, : len(each["labels"])] = torch.tensor(each["labels"])
        assert not (labels == place).any()
        return {**found, "labels": labels}

    class InOrder(Trainer):
        def _get_train_sampler(self, *_args: Any) -> Any:
            return order

    arguments = trainer_arguments.of_run(settings, tmp_path / "theirs", len(examples))
    trainer = InOrder(model, arguments, train_dataset=examples, eval_dataset=examples, data_collator=batch)
    trainer.train()
    theirs = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    assert ours == pytest.approx(theirs, rel=1e-5) and len(ours) == 3


@pytest.mark.nightly
def test_training_evaluating_and_answering(chats: Path, smolvlm: Path, tmp_path: Path, run: Run) -> None:
    options = ("--method", "lora", "--set", "r=4", "--device", "cpu", "--max-length", "200", "--eval-data", chats)
    run("train", "--model", smolvlm, "--data", chats, *options, "--steps", "2", "--output", tmp_path / "run")
    task = json.loads((tmp_path / "run" / "adapter" / "peftcore_task.json").read_text())
    assert task["task"] == "image-text"
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["after"]["loss"] != result["before"]["loss"]
    run(
        "predict",
        tmp_path / "run",
        "--data",
        chats,
        "--answer-tokens",
        "3",
        "--output",
        tmp_path / "a.jsonl",
    )
    found = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [len(each["images"]) for each in found] == [1, 2, 1, 0, 1, 2] and found[0]["prompt"] == "is it good"
    assert "Use peftcore predict" in run("generate", tmp_path / "run", "--prompt", "is it", code=1).output


@pytest.mark.parametrize("kind", ["qwen", "llava", "mllama", "gemma"])
@pytest.mark.nightly
def test_answers_of_other_models(kind: str, chats: Path, tmp_path: Path) -> None:
    """Each answer is what the model generates after what the processor itself makes of the messages."""
    processor = media_chats.check_processor(image_models.KINDS[kind](tmp_path / kind), kind)
    model = models.load_model(str(tmp_path / kind), "image-text", device="cpu")
    task, about = find("image-text"), AdapterTask("image-text", 200)
    rows = task.read_questions([str(chats)], None, about)
    found = task.predict(model, rows, processor, about, answer_tokens=3)
    images = [{"type": "image", "path": path} for path in rows[0].images]
    messages = [{"role": "user", "content": [*images, {"type": "text", "text": "is it good"}]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = processor.apply_chat_template(messages, **options)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=3, pad_token_id=0)
    answer = processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found[0]["answer"] == answer


def test_a_missing_torchvision_is_named(smolvlm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoProcessor

    def missing(*_args: Any, **_options: Any) -> Any:
        raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library but it was not found")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", missing)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(PeftcoreError, match=r"needs torchvision.*: pip install torchvision$"):
        find("image-text").load_processor(str(smolvlm))
