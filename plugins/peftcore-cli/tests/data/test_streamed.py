"""`--streaming`: rows that are tokenized when a batch needs them, in an order that resumes."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peftcore_cli.bases import models
from peftcore_cli.data import holdout, row_reading, streamed
from peftcore_cli.data.row import Row
from peftcore_cli.settings import Settings
from peftcore_cli.tasks.registered import find
from peftcore_cli.training import trainer_arguments
from peftcore_cli.training.sampler import LengthGroupedSampler
from safetensors.torch import load_file
from support.commands import Run, write_jsonl

import peftcore
from peftcore import PeftcoreError

WORDS = ("good", "bad", "dull", "bright", "fun", "very good", "no story")
WORDS_OF_FOUR = ("film", "good", "dull", "with", "much", "very")
METHOD = ("--method", "lora", "--set", "r=4", "--device", "cpu", "--batch-size", 4)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder of two files with 14 rows, with an empty line, a mark of byte order and characters of several bytes."""
    rows = [
        {"prompt": f"the film is {word}", "completion": more} for word in WORDS for more in ("it was é", "not a story")
    ]
    folder = tmp_path / "shards"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", rows[:9])
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows[9:])
    (folder / "b.jsonl").write_text("\ufeff" + text.rstrip(), encoding="utf-8")
    return folder


def test_rows_without_anything_to_learn() -> None:
    rows = [Row(f"f:{i}", word) for i, word in enumerate(WORDS)]
    examples = streamed.EncodedRows(
        rows, lambda chunk: [{"text": f"{row.text} {i}"} for row in chunk for i in range(2) if row.text != "no story"]
    )
    assert len(examples) == 7 and examples[1] == {"text": "bad 0"}
    assert examples[6] == {"text": "good 0"}  # the next row after the last is the first
    with pytest.raises(PeftcoreError, match="no row has a token to learn"):
        streamed.EncodedRows(rows, lambda chunk: [])[0]


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_few_rows_are_tokenized_before_the_first_step(
    bert: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a table with two labels, with and without `--streaming`; the labels of all rows are known in both."""
    from transformers import Trainer

    rows = [{"text": f"the film is {WORDS[i % 5]}", "label": ("down", "up")[i % 2]} for i in range(300)]
    rows[-1]["label"] = "other"
    path = table(tmp_path / "rows.csv", rows)
    task, tokenized, before_steps = find("classification"), list[int](), list[int]()
    encode, step = type(task).encode, Trainer.training_step

    def encoding(self: Any, chunk: Any, *args: Any, **kwargs: Any) -> Any:
        tokenized.append(len(chunk))
        return encode(self, chunk, *args, **kwargs)

    def stepping(self: Any, *args: Any, **kwargs: Any) -> Any:
        before_steps.append(sum(tokenized))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(type(task), "encode", encoding)
    monkeypatch.setattr(Trainer, "training_step", stepping)
    common = ("train", "-m", bert, "-d", path, *METHOD, "--holdout", 6, "--steps", 2)
    labels = []
    for options in ((), ("--streaming",)):
        tokenized.clear()
        output = tmp_path / f"run{len(options)}"
        run(*common, *options, "-o", output)
        record = json.loads((output / "adapter" / "peftcore_task.json").read_text())
        labels.append(record["labels"])
    every_row, _, first_streamed, second_streamed = before_steps
    assert every_row == 300
    # The first rows, the held-out ones, one for Trainer, and the batches of four, of which the loader reads one ahead.
    assert first_streamed <= second_streamed <= 100 + 6 + 1 + 3 * 4
    assert labels == [["down", "other", "up"]] * 2


ROWS: dict[str, Any] = {
    "dpo": lambda word: {"prompt": "the film", "chosen": f"is {word}", "rejected": f"was {word}"},
    "reward": lambda word: {"prompt": "the film", "chosen": f"is {word}", "rejected": f"was {word}"},
    "kto": lambda word: {"prompt": "the film", "completion": f"is {word}", "label": word in WORDS_OF_FOUR[::2]},
    "pairs": lambda word: {"anchor": f"the film is {word}", "positive": word},
    "tags": lambda word: {"tokens": ["the", word], "tags": ["O", "B" if word in WORDS_OF_FOUR[::2] else "C"]},
}


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL calls what transformers has deprecated
@pytest.mark.parametrize("task", ROWS)
def test_tasks(task: str, llama: Path, bert: Path, tmp_path: Path, run: Run) -> None:
    """Rows of one size, whose order is that of a run without `--streaming`, train the same adapter."""
    path = write_jsonl(tmp_path / "rows.jsonl", [ROWS[task](word) for word in WORDS_OF_FOUR])
    base = bert if task in ("pairs", "tags") else llama
    for options in ((), ("--streaming",)):
        output = tmp_path / f"run{len(options)}"
        run(
            "train",
            "-m",
            base,
            "-d",
            path,
            "--task",
            task,
            *METHOD,
            *options,
            "--holdout",
            2,
            "--steps",
            2,
            "-o",
            output,
        )
    whole, streamed_ = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("run0", "run1"))
    assert whole.read_bytes() == streamed_.read_bytes()


def test_misuse(shards: Path, llama: Path, tmp_path: Path, run: Run) -> None:
    common = ("train", "--model", llama, "--method", "lora", "--output", tmp_path / "run", "--streaming")
    assert "--holdout 500, or --eval-data" in run(*common, "--data", shards, code=1).output
    assert "--pack needs the lengths" in run(*common, "--data", shards, "--holdout", 2, "--pack", code=1).output
    pairs = [{"prompt": "is it", "chosen": f"very {word}", "rejected": "not"} for word in WORDS]
    path = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    refused = run(*common, "--data", path, "--task", "orpo", "--holdout", 2, code=1).output
    assert "--streaming does not work with --task orpo, because TRL's ORPOTrainer" in refused
    (shards / "b.jsonl").write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt": 3, "completion": "b"}\n')
    assert "b.jsonl:3: 'prompt' must be text" in run(*common, "--data", shards, "--holdout", 2, code=1).output


@pytest.mark.nightly
def test_losses_are_those_of_transformers_trainer_and_resume_is_exact(
    shards: Path, llama: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer, set_seed

    common = ("train", "--model", llama, "--data", shards, *METHOD, "--streaming", "--holdout", 2, "--lr", "1e-2")
    common += ("--steps", 5, "--save-every", 2, "--fuse", "off", "--without-logits", "off")
    run(*common, "--output", tmp_path / "whole")
    state = tmp_path / "whole" / "checkpoints" / "checkpoint-5" / "trainer_state.json"
    ours = [each["loss"] for each in json.loads(state.read_text())["log_history"] if "loss" in each]

    tokenizer = models.load_tokenizer(str(llama))
    rows, _ = holdout.split(row_reading.read(shards, "causal-lm")[1], 2, 0)
    sampler = LengthGroupedSampler([rows.size(i) for i in range(12)], 4, 0)
    examples = find("causal-lm").encode(rows[:], tokenizer, 512).examples
    order = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order += [examples[i] for i in sampler]
    set_seed(0)
    model = models.load_model(str(llama), "causal-lm", device="cpu")
    peftcore.apply(model, "lora", r=4)
    settings = Settings(
        model="m", data="d", task="causal-lm", method="lora", steps=5, batch_size=4, lr=1e-2, device="cpu"
    )
    arguments = trainer_arguments.of_run(settings, tmp_path / "theirs", len(order))
    arguments.train_sampling_strategy = "sequential"
    trainer = Trainer(
        model,
        arguments,
        train_dataset=order,
        eval_dataset=order[:2],
        data_collator=find("causal-lm").collator(tokenizer),
    )
    trainer.train()
    theirs = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    assert ours == pytest.approx(theirs, rel=1e-4) and len(ours) == 5

    # A run that stops after the second step, within an epoch, and continues.
    from peftcore_cli.training import progress

    counted = itertools.count(1)
    plain = progress.OrderlyStop.on_step_end

    def stopping(self: Any, arguments: Any, state: Any, control: Any, **more: Any) -> Any:
        if next(counted) == 2:
            self.is_requested = True
        return plain(self, arguments, state, control, **more)

    monkeypatch.setattr(progress.OrderlyStop, "on_step_end", stopping)
    parts = (*common, "--output", tmp_path / "parts")
    run(*parts, code=130)
    run(*parts, "--resume")
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
