"""`--task seq2seq`: sources and targets as tokens, the loss by hand, and training as Trainer's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peftcore_cli.bases import models
from peftcore_cli.data import row_reading
from peftcore_cli.settings import Settings
from peftcore_cli.tasks.registered import find
from peftcore_cli.training import trainer_arguments
from peftcore_cli.training.sampler import LengthGroupedSampler
from support.commands import SPECIAL, WORDS, Run, save_tokenizer, write_jsonl
from support.measured import measured

import peftcore
from peftcore import PeftcoreError

METHOD = ("--method", "lora", "--set", "r=4", "--device", "cpu")
ROWS = [
    {"source": f"{begin} {word}", "target": answer}
    for begin in ("the film is", "it was", "the story is very")
    for word, answer in (("good", "fun"), ("bad", "no heart"))
]


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a T5 of random weights."""
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "initializer_factor": 0.5}
    special = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "tie_word_embeddings": False}
    config = T5Config(vocab_size=len(SPECIAL + WORDS), dropout_rate=0.0, **sizes, **special)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BART of random weights."""
    from transformers import BartConfig, BartForConditionalGeneration

    folder = tmp_path_factory.mktemp("bart")
    torch.manual_seed(0)
    sizes = {
        f"{side}_{name}": size
        for side in ("encoder", "decoder")
        for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
    }
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "init_std": 0.2}
    config = BartConfig(
        vocab_size=len(SPECIAL + WORDS), d_model=32, dropout=0.0, forced_eos_token_id=None, **sizes, **special
    )
    BartForConditionalGeneration(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_rows_and_tokens(tmp_path: Path, t5: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS[:1])
    (row,) = row_reading.read_rows(path, "seq2seq")
    assert (row.text, row.completion) == ("the film is good", "fun") and row_reading.guess_task(path) == "seq2seq"
    tokenizer = models.load_tokenizer(str(t5))
    source, target = (tokenizer(text)["input_ids"] for text in (row.text, "fun"))
    found = find("seq2seq").encode([row], tokenizer, 16)
    assert found.examples == [{"input_ids": source, "labels": [*target, 2]}] and found.truncated == 0
    assert find("seq2seq").encode([row], tokenizer, 2).examples == [{"input_ids": source[:2], "labels": [*target, 2]}]
    batch = find("seq2seq").collator(tokenizer)([*found.examples, {"input_ids": [5], "labels": [6, 7, 2]}])
    assert batch["labels"].tolist() == [[*target, 2, -100], [6, 7, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "a"}, "seq2seq needs the keys source/target, found source"),
        ({"source": "a", "target": " "}, "'target' is empty"),
        ({"source": ["a"], "target": "b"}, "'source' must be text"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": []}, "'prompt' must be text"),
    ],
)
def test_wrong_rows(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PeftcoreError, match=rf"rows.jsonl:1: {message}"):
        row_reading.read_rows(write_jsonl(tmp_path / "rows.jsonl", [fields]), "seq2seq")


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_loss_is_over_all_target_tokens(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(name)
    tokenizer, model = models.load_tokenizer(str(folder)), models.load_model(str(folder), "seq2seq", device="cpu")
    rows = row_reading.read_rows(write_jsonl(tmp_path / "rows.jsonl", ROWS), "seq2seq")
    examples = find("seq2seq").encode(rows, tokenizer, 16).examples
    start = model.config.decoder_start_token_id
    logs = []
    with torch.no_grad():
        for each in examples:
            target = each["labels"]
            logits = model(
                input_ids=torch.tensor([each["input_ids"]]), decoder_input_ids=torch.tensor([[start, *target[:-1]]])
            ).logits[0]
            logs += [-logits.log_softmax(-1)[i, token] for i, token in enumerate(target)]
    for size in (1, 4):
        found = measured("seq2seq", model, examples, tokenizer, size)
        assert found.count == len(logs) == 15 and found.loss == pytest.approx(float(sum(logs) / 15), rel=1e-5)


def test_end_to_end(run: Run, t5: Path, tmp_path: Path) -> None:
    path, output = write_jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "run"
    arguments = ("-m", t5, "-d", path, "--eval-data", path, *METHOD, "--set", "target_modules=all-linear", "--lr", 0.05)
    more = ("--steps", 24, "--eval-every", 24, "--metric", "exact_match", "--load-best", "--batch-size", 6)
    run("train", *arguments, "-o", output, *more, "--answer-tokens", 4)
    found = json.loads((output / "result.json").read_text())
    assert list(found["after"]) == ["loss", "exact_match", "rouge_l", "perplexity"]
    assert found["before"]["exact_match"] == 0 and found["after"]["exact_match"] >= 0.5
    assert run("generate", output, "-p", "it was good", "--max-new-tokens", 4).output.strip() in (
        "fun",
        "no heart",
    )
    shown = run("eval", output, "-d", path, "--metric", "rouge_l", "--answer-tokens", 4).output
    assert f"{found['after']['rouge_l']:.4f}" in shown


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_losses_are_those_of_seq2seq_trainer(
    run: Run, name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq, Seq2SeqTrainer, set_seed

    folder = request.getfixturevalue(name)
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    common = ("-m", folder, "-d", path, "--eval-data", path, *METHOD, "--set", "lora_dropout=0.0")
    run("train", *common, "--lr", "0.02", "--batch-size", 3, "-o", tmp_path / "run", "--epochs", 2)
    state = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint-4" / "trainer_state.json").read_text())
    ours = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    tokenizer = models.load_tokenizer(str(folder))
    examples = [
        {**tokenizer(row["source"]), "labels": [*tokenizer(text_target=row["target"])["input_ids"], 2]} for row in ROWS
    ]
    order = LengthGroupedSampler([len(each["input_ids"]) for each in examples], 3, 0)
    drawn = [examples[i] for i in order]
    order.set_epoch(1)
    drawn += [examples[i] for i in order]
    set_seed(0)
    model = peftcore.apply(AutoModelForSeq2SeqLM.from_pretrained(folder), "lora", r=4)
    settings = Settings(model="", data="", task="seq2seq", method="lora", lr=0.02, batch_size=3, device="cpu")
    arguments = trainer_arguments.of_run(settings, tmp_path / "theirs", 12)
    arguments.num_train_epochs, arguments.train_sampling_strategy = 1, "sequential"
    arguments.warmup_steps, arguments.eval_strategy, arguments.save_strategy = 1, "no", "no"
    arguments.generation_config, arguments.predict_with_generate, arguments.sortish_sampler = None, False, False
    trainer = Seq2SeqTrainer(
        model=model, args=arguments, train_dataset=drawn, data_collator=DataCollatorForSeq2Seq(tokenizer, model)
    )
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(ours) == 4 and ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.nightly
def test_accumulated_batches_are_averaged(run: Run, t5: Path, tmp_path: Path) -> None:
    """The loss of T5 is a mean over its batch, which Trainer has to divide by the number of batches."""
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS[:1] * 4)
    arguments = ("--batch-size", 1, "--grad-accum", 4, "--steps", 1, "--eval-data", path, "-o", tmp_path / "run")
    run("train", "-m", t5, "-d", path, *METHOD, *arguments)
    state = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint-1" / "trainer_state.json").read_text())
    loss = next(entry["loss"] for entry in state["log_history"] if "loss" in entry)
    before = json.loads((tmp_path / "run" / "result.json").read_text())["before"]["loss"]
    assert loss == pytest.approx(before, rel=1e-3)
