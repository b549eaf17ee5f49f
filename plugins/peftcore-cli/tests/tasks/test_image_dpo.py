"""`--task image-dpo`: which of two answers to a conversation with images is better."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peftcore_cli.bases import models
from peftcore_cli.data import row_reading
from peftcore_cli.tasks import image_dpo, media_chats
from peftcore_cli.tasks.conversations import IGNORE_INDEX
from peftcore_cli.tasks.registered import find
from PIL import Image
from support import image_models
from support.commands import Run, write_jsonl
from support.measured import measured

import peftcore
from peftcore import PeftcoreError

ASKED = [{"role": "user", "content": [{"type": "image", "path": "1.png"}, {"type": "text", "text": "is it good"}]}]
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("very good", "it is bad and dull"))
PAIR = {"chosen": [GOOD], "rejected": [BAD]}

OTHERS = ("qwen", "llava", "mllama", "gemma")


@pytest.fixture(scope="session")
def smolvlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smolvlm")
    image_models.smolvlm(folder)
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Pairs in the forms of data sets, with one image, two, or none."""
    for i, size in enumerate(((20, 30), (8, 8))):
        Image.new("RGB", size, (60 * i, 200, 20)).save(tmp_path / f"{i}.png")
    rows: list[dict[str, Any]] = [
        {"prompt": ASKED, **PAIR},
        {"chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]},  # both are whole
        {"images": ["1.png"], "prompt": "is it good", "chosen": "very good", "rejected": "it is bad and dull"},
        {  # LLaMA-Factory's
            "images": ["1.png"],
            "conversations": [{"from": "human", "value": "<image>is it good"}],
            "chosen": {"from": "gpt", "value": "very good"},
            "rejected": {"from": "gpt", "value": "it is bad and dull"},
        },
        {"images": ["0.png", "1.png"], "prompt": "is <image> it <image>", "chosen": "no", "rejected": "fun"},
        {"prompt": [{"role": "user", "content": "the film"}], **PAIR},
    ]
    return write_jsonl(tmp_path / "pairs.jsonl", rows)


def test_rows_of_every_form_are_the_same(pairs: Path) -> None:
    rows = row_reading.read_rows(pairs, "image-dpo")
    assert row_reading.guess_task([str(pairs)]) == "image-dpo"
    asked = [{"type": "image"}, {"type": "text", "text": "is it good"}]
    for row in rows[:4]:
        assert row.messages == [{"role": "user", "content": asked}]
        assert [Path(image).name for image in row.images] == ["1.png"]
        for answer, text in ((row.completion, "very good"), (row.rejected, "it is bad and dull")):
            assert answer == [{"role": "assistant", "content": [{"type": "text", "text": text}]}]
    assert [len(row.images) for row in rows[4:]] == [2, 0]
    for task in ("dpo", "orpo", "reward"):
        for line in pairs.read_text().splitlines()[:4]:
            with pytest.raises(PeftcoreError, match=r"does not support images. Use --task image-dpo"):
                row_reading.row_of("a.jsonl:1", json.loads(line), find(task))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ASKED, "chosen": [GOOD], "rejected": [GOOD]}, "are the same"),
        ({"prompt": ASKED, "chosen": [GOOD, BAD], "rejected": [BAD]}, "'chosen' must be a single assistant answer"),
        ({"prompt": ASKED, "chosen": "", "rejected": "bad"}, "empty assistant turn"),
        ({"images": ["1.png", "0.png"], "prompt": "<image> it", **PAIR}, "lists 2 images, but its turns refer to 1"),
        ({"images": ["none.png"], "prompt": "it", **PAIR}, "'.*none.png' does not exist"),
    ],
)
def test_wrong_rows(pairs: Path, fields: dict[str, Any], message: str) -> None:
    write_jsonl(pairs, [fields])
    with pytest.raises(PeftcoreError, match=rf"pairs.jsonl:1: .*{message}"):
        row_reading.read_rows(pairs, "image-dpo")


@pytest.mark.parametrize("kind", ["smolvlm", *(pytest.param(k, marks=pytest.mark.nightly) for k in OTHERS)])
def test_answers_alone_are_compared(pairs: Path, kind: str, tmp_path: Path) -> None:
    processor = media_chats.check_processor(image_models.KINDS[kind](tmp_path / kind), kind)
    examples = find("image-dpo").encode(row_reading.read_rows(pairs, "image-dpo"), processor, 400).examples
    batch = image_dpo.trl_collator(processor)(examples)
    learned = [
        processor.tokenizer.decode(ids[mask.bool()], skip_special_tokens=True).split()
        for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    assert learned == [["very", "good"]] * 4 + [["no"], ["very", "good"]] + [["it", "is", "bad", "and", "dull"]] * 4 + [
        ["fun"],
        ["it", "is", "bad", "and", "dull"],
    ]
    assert batch["attention_mask"].shape == batch["completion_mask"].shape and "labels" not in batch
    found = find("image-dpo").lengths(examples)
    assert found == [max(len(e["chosen"]["labels"]), len(e["rejected"]["labels"])) for e in examples]
    with pytest.raises(PeftcoreError, match=r"for [12] images\) and cannot be truncated"):
        find("image-dpo").encode(row_reading.read_rows(pairs, "image-dpo"), processor, 6)


def test_the_figures_are_those_of_the_formula(pairs: Path, smolvlm: Path) -> None:
    processor = find("image-dpo").load_processor(str(smolvlm))
    model = models.load_model(str(smolvlm), "image-dpo", device="cpu")
    examples = find("image-dpo").encode(row_reading.read_rows(pairs, "image-dpo"), processor, 400).examples[3:]

    def answers() -> torch.Tensor:
        """Return log p of the chosen and the rejected answers, one by one."""
        found = []
        for each in examples:
            for side in ("chosen", "rejected"):
                batch = media_chats.collate([each[side]], processor)
                labels = batch.pop("labels")[0, 1:]
                with torch.no_grad():
                    scores = model(**batch).logits[0, :-1].log_softmax(-1)
                kept = labels != IGNORE_INDEX
                found.append(scores[kept].gather(1, labels[kept, None]).sum())
        return torch.stack(found).view(-1, 2)

    base = answers()
    peftcore.apply(model, "lora", init_lora_weights=False)
    margins = 0.2 * ((answers() - base) @ torch.tensor([1.0, -1.0]))
    found = measured("image-dpo", model, examples, processor, 2, beta=0.2)
    assert found.loss == pytest.approx(float(-torch.nn.functional.logsigmoid(margins).mean()), rel=1e-4)
    assert found.as_dict()["margin"] == pytest.approx(float(margins.mean()), rel=1e-3)


@pytest.mark.filterwarnings("ignore")  # of models and trainers
def test_a_run_learns_the_preference(pairs: Path, smolvlm: Path, run: Run, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    output = tmp_path / "run"
    given = ("-m", smolvlm, "-d", pairs, "--eval-data", pairs, "--method", "lora", "--dtype", "fp32", "-o", output)
    run("train", *given, "--steps", "6", "--batch-size", "3", "--lr", "0.02", "--max-length", "100")
    found = json.loads((output / "result.json").read_text())
    assert found["before"]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert found["after"]["loss"] < 0.68 and found["after"]["preference_accuracy"] == 1.0
    assert f"{found['after']['loss']:.4f}" in run("eval", output, "-d", pairs).output
    chats = write_jsonl(tmp_path / "asked.jsonl", [{"messages": ASKED}])
    answers = tmp_path / "answers.jsonl"
    run("predict", output, "-d", chats, "-o", answers)
    assert len(answers.read_text().splitlines()) == 1
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": [*ASKED, GOOD]}] * 4)
    run("train", "-a", output, "-d", chats, "--steps", "1", "--max-length", "100", "-o", tmp_path / "on")
    assert json.loads((tmp_path / "on/run.json").read_text())["task"] == "image-text"
