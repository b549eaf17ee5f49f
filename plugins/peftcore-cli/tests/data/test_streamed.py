"""`--streaming`: lines that are read when a batch needs them, in an order that resumes and that ranks share."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peftcore_cli.bases import models
from peftcore_cli.data import row_reading, streamed
from peftcore_cli.settings import Display, RunOptions, Settings
from peftcore_cli.tasks.registered import find
from peftcore_cli.training import option_checks, trainer_arguments
from safetensors.torch import load_file
from support.commands import Run, write_jsonl

import peftcore
from peftcore import PeftcoreError

WORDS = ("good", "bad", "dull", "bright", "fun", "very good", "no story")


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


def test_rows_are_those_of_reading_all(shards: Path) -> None:
    lines = streamed.Lines([str(shards)], "causal-lm", None)
    wanted = row_reading.read_rows(str(shards), "causal-lm")
    assert len(lines) == len(wanted) == 14
    found = [lines[i] for i in (13, *range(13))]
    assert [(row.text, row.completion) for row in found] == [(r.text, r.completion) for r in (wanted[13], *wanted[:13])]


def test_wrong_files(shards: Path, tmp_path: Path) -> None:
    (shards / "b.jsonl").write_text(
        '{"text": "a"}\n\n{"text": 3}\n{"text"\n["a"]\n{"text": "text"}\n', encoding="utf-8"
    )
    lines = streamed.Lines([str(shards)], "causal-lm", None)
    for index, message in (
        (10, "b.jsonl:3: 'text' must be text"),
        (11, "b.jsonl:4: invalid JSON"),
        (12, "b.jsonl:5: an example must be"),
        (13, "b.jsonl:6: the line repeats the header"),
    ):
        with pytest.raises(PeftcoreError, match=message):
            lines[index]
    (tmp_path / "rows.csv").write_text("text\na\n")
    (tmp_path / "none.jsonl").write_text("\n")
    for path, message in (
        ("rows.csv", "only reads .jsonl files"),
        ("no.jsonl", "does not exist"),
        ("none.jsonl", "has no examples"),
        ("shards:2", "uses every line once"),
    ):
        with pytest.raises(PeftcoreError, match=message):
            streamed.Lines([str(tmp_path / path)], "causal-lm", None)


def test_marked_answers_are_not_streamed() -> None:
    with pytest.raises(PeftcoreError, match=r"--streaming only works with causal-lm and seq2seq \(the task is kto\)"):
        option_checks.check(RunOptions(streaming=True), Display(), "kto", [], continues=False)


def test_lines_without_anything_to_learn_and_held_out_lines(shards: Path) -> None:
    lines = streamed.Lines([str(shards)], "causal-lm", None)
    examples = streamed.EncodedLines(
        lines, lambda rows: [{"text": row.text} for row in rows if "bad" not in row.text], [0, 3]
    )
    assert len(examples) == 12 and [examples.index(i) for i in range(12)] == [1, 2, *range(4, 14)]
    assert examples[1] == {"text": "the film is dull"}  # line 2 is about a bad film, line 3 is held out
    with pytest.raises(PeftcoreError, match="no line has a token to learn"):
        streamed.EncodedLines(lines, lambda rows: [])[0]
    chosen = streamed.choose_held_out(lines, 3, 0)
    assert len(set(chosen)) == 3 and chosen == streamed.choose_held_out(lines, 3, 0) != streamed.choose_held_out(
        lines, 3, 1
    )
    with pytest.raises(PeftcoreError, match="leaves no lines to train on: the files have 14"):
        streamed.choose_held_out(lines, 14, 0)


def test_each_line_once_in_an_order_of_seed_and_epoch(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "_BLOCK", 3)
    monkeypatch.setattr(streamed, "_BLOCKS", 2)
    examples = streamed.EncodedLines(streamed.Lines([str(shards)], "causal-lm", None), lambda rows: [{}])
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        sampler = streamed.BlockSampler(examples, 4, seed)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert Counter(orders[-1]) == Counter(range(14)) and list(sampler) == orders[-1] and len(sampler) == 14
    assert len({tuple(order) for order in orders}) == 3
    assert {place // 3 for place in orders[0][:4]} <= {place // 3 for place in orders[0][:6]}  # two blocks at a time
    assert len({place // 3 for place in orders[0][:4]}) <= 2


@pytest.mark.nightly
def test_misuse(shards: Path, labelled: Path, llama: Path, tmp_path: Path, run: Run) -> None:
    common = ("train", "--model", llama, "--method", "lora", "--output", tmp_path / "run", "--streaming")
    assert "--holdout 500, or --eval-data" in run(*common, "--data", shards, code=1).output
    assert "--streaming only works with causal-lm and seq2seq" in run(*common, "--data", labelled, code=1).output
    assert "--pack needs the lengths" in run(*common, "--data", shards, "--holdout", 2, "--pack", code=1).output


def test_ranks_take_batches_of_one_order(shards: Path) -> None:
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    examples = streamed.EncodedLines(streamed.Lines([str(shards)], "causal-lm", None), lambda rows: [{}])
    batches = BatchSampler(streamed.BlockSampler(examples, 2, 0), 2, drop_last=False)
    one, other = (list(BatchSamplerShard(batches, 2, rank, even_batches=False)) for rank in range(2))
    assert one == list(batches)[::2] and other == list(batches)[1::2]


@pytest.mark.nightly
def test_losses_are_those_of_transformers_trainer_and_resume_is_exact(
    shards: Path, llama: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer, set_seed

    common = ("train", "--model", llama, "--data", shards, "--method", "lora", "--set", "r=4", "--device", "cpu")
    common += ("--streaming", "--holdout", 2, "--batch-size", 4, "--lr", "1e-2", "--steps", 5, "--save-every", 2)
    run(*common, "--output", tmp_path / "whole", "--fuse", "off", "--without-logits", "off")
    state = tmp_path / "whole" / "checkpoints" / "checkpoint-5" / "trainer_state.json"
    ours = [each["loss"] for each in json.loads(state.read_text())["log_history"] if "loss" in each]

    lines = streamed.Lines([str(shards)], "causal-lm", None)
    tokenizer = models.load_tokenizer(str(llama))
    kept = streamed.choose_held_out(lines, 2, 0)

    def encode(rows: list[Any]) -> list[dict[str, Any]]:
        return find("causal-lm").encode(rows, tokenizer, 512).examples

    sampler = streamed.BlockSampler(streamed.EncodedLines(lines, encode, kept), 4, 0)
    order = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order += [encode([lines[sampler.examples.index(place)]])[0] for place in sampler]
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
            self.requested = True
        return plain(self, arguments, state, control, **more)

    monkeypatch.setattr(progress.OrderlyStop, "on_step_end", stopping)
    parts = (*common, "--output", tmp_path / "parts", "--fuse", "off", "--without-logits", "off")
    run(*parts, code=130)
    run(*parts, "--resume")
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
