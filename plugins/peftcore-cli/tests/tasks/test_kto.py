"""Answers marked as good or bad: how files have them, KTO by hand, and training as TRL's own trainers do it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peftcore_cli.bases import models
from peftcore_cli.bases.adapter_folders import adapter_task
from peftcore_cli.data import row_reading
from peftcore_cli.data.row import Row
from peftcore_cli.settings import Settings
from peftcore_cli.tasks import kto
from peftcore_cli.tasks.registered import find
from peftcore_cli.training import trainer_arguments
from peftcore_cli.training.sampler import LengthGroupedSampler
from support.commands import Run, write_jsonl
from support.measured import measured

import peftcore
from peftcore import PeftcoreError

ASKED = [{"role": "user", "content": "is it good"}]
GOOD = [{"role": "assistant", "content": "it is very good"}]
ROWS = [
    {"prompt": f"the {word} is", "completion": answer, "label": label}
    for word in ("film", "story", "heart", "fun")
    for answer, label in ((" very good", True), (" dull bad", False))  # TRL tokenizes prompt and answer as one text
]


def read(folder: Path, fields: dict[str, Any]) -> Row:
    (row,) = row_reading.read_rows(write_jsonl(folder / "rows.jsonl", [fields]), "kto")
    return row


@pytest.fixture
def tokenizer(llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(llama)


def test_how_files_have_them(tmp_path: Path) -> None:
    found = read(tmp_path, {"prompt": "a", "completion": "b", "label": True})
    assert (found.text, found.completion, found.is_good) == ("a", "b", True)
    assert row_reading.guess_task(tmp_path / "rows.jsonl") == "kto"
    assert read(tmp_path, {"prompt": "a", "completion": "b", "label": "False"}).is_good is False
    found = read(tmp_path, {"prompt": ASKED, "completion": GOOD, "label": 1})
    assert (found.messages, found.completion, found.is_good) == (ASKED, GOOD, True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "a", "completion": "b"}, "kto needs the keys prompt/completion/label, found prompt, completion"),
        ({"prompt": "a", "completion": "b", "label": "good"}, "'label' must be true or false, found \"good\""),
        ({"prompt": "a", "completion": " ", "label": True}, "'completion' is empty"),
        (
            {"prompt": ASKED, "completion": ASKED, "label": True},
            "'completion' must be a single assistant answer, found user",
        ),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PeftcoreError, match=rf"rows.jsonl:1: {message}"):
        read(tmp_path, fields)


@pytest.mark.parametrize(("mark", "other"), [(True, "false"), (False, "true")])
def test_answers_of_one_mark_are_refused(mark: bool, other: str) -> None:
    rows = [Row(f"file:{number}", "a", completion="b", is_good=mark) for number in (1, 2)]
    with pytest.raises(
        PeftcoreError, match=rf"file:1: every answer has the label .* Add answers with the label {other}"
    ):
        find("kto").check_rows(rows)


def test_training_with_answers_of_one_mark_is_refused(run: Run, llama: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [row for row in ROWS if row["label"]])
    arguments = ("-m", llama, "-d", path, "-o", tmp_path / "run", "--method", "lora", "--steps", 1, "--task", "kto")
    assert "every answer has the label true" in run("train", *arguments, code=1).output


def test_tokens(tmp_path: Path, tokenizer: Any) -> None:
    row = read(tmp_path, {"prompt": "the film is", "completion": "very good", "label": True})
    (example,) = find("kto").encode([row], tokenizer, 32).examples
    prompt, answer = (tokenizer(text)["input_ids"] for text in ("the film is", "very good"))
    answer = [*answer, tokenizer.eos_token_id]
    assert example == {"prompt_ids": prompt, "completion_ids": answer, "label": True}
    short = find("kto").encode([row], tokenizer, 4)
    assert short.truncated == 1 and short.examples[0]["prompt_ids"] == prompt[2:]
    assert find("kto").lengths(short.examples) == [4]


def test_loss_by_hand(llama: Path, tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama)
    rows = [read(tmp_path, row) for row in (ROWS[0], ROWS[3], {**ROWS[0], "completion": "no heart and no fun"})]
    examples = find("kto").encode(rows, tokenizer, 32).examples
    assert measured("kto", model, examples, tokenizer).loss == pytest.approx(0.5)
    before = [[chance(model, one, other) for other in examples] for one in examples]
    torch.manual_seed(1)
    peftcore.apply(model, "lora", r=2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval()
    after = [[chance(model, one, other) for other in examples] for one in examples]
    ratio = [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(after, before, strict=True)]
    k = 0.5 * max(0.0, (ratio[0][2] + ratio[1][0] + ratio[2][1]) / 3)
    distances = [0.5 * ratio[0][0] - k, k - 0.5 * ratio[1][1], 0.5 * ratio[2][2] - k]
    for size in (1, 3):
        found = measured("kto", model, examples, tokenizer, size, beta=0.5)
        wanted = sum(1 - float(torch.tensor(each).sigmoid()) for each in distances) / 3
        assert found.loss == pytest.approx(wanted, rel=1e-4) and found.figures["kl"] == pytest.approx(k, rel=1e-4)
        assert found.figures["accuracy"] == sum(each > 0 for each in distances) / 3
        assert found.figures["margin"] == pytest.approx(0.5 * ((ratio[0][0] + ratio[2][2]) / 2 - ratio[1][1]), rel=1e-4)
    assert list(measured("kto", model, [examples[0], examples[2]], tokenizer).figures) == ["accuracy", "kl"]


@torch.no_grad()
def chance(model: Any, asked: dict[str, Any], answered: dict[str, Any]) -> float:
    """log p of one example's answer to another's prompt, token by token."""
    begin, ids = len(asked["prompt_ids"]), asked["prompt_ids"] + answered["completion_ids"]
    logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logs[i - 1, ids[i]]) for i in range(begin, len(ids)))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL calls what transformers has deprecated
def test_kto_end_to_end(run: Run, llama: Path, tmp_path: Path) -> None:
    path, output = write_jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "run"
    arguments = ("-m", llama, "-d", path, "--eval-data", path, "--method", "lora", "--set", "r=4", "--lr", "0.02")
    run("train", *arguments, "-o", output, "--steps", 8, "--batch-size", 4, "--load-best", "--metric", "margin")
    found = json.loads((output / "result.json").read_text())
    assert found["before"] == {"loss": pytest.approx(0.5), "accuracy": 0.0, "margin": 0.0, "kl": 0.0}
    assert found["after"]["loss"] < 0.45 and found["after"]["accuracy"] >= 0.75 and found["after"]["margin"] > 0.3
    assert f"{found['after']['loss']:.4f}" in run("eval", output, "-d", path).output
    wrong = run("train", *arguments, "-o", tmp_path / "no", "--batch-size", 1, code=1).output
    assert "--task kto compares the answers in a batch, so --batch-size 1" in wrong


def test_a_batch_of_one_has_the_answer_of_another_example(llama: Path) -> None:
    collate = kto.trl_collator(models.load_tokenizer(str(llama)))
    ids = [[4, 5], [6], [7, 8]]
    rows = [{"prompt_ids": [1], "completion_ids": each, "label": True} for each in ids]
    examples = kto.MismatchedAnswers(rows)
    assert collate([examples[1]])["KL_input_ids"].tolist() == [[1, 4, 5]]
    assert collate(examples[1:])["KL_input_ids"].tolist() == [[1, 7, 8], [1, 6, 0]]  # in the batch


def test_weights_of_answers(tmp_path: Path) -> None:
    examples = [{"label": True}, {"label": False}, {"label": True}]
    after, before = [torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3)], [torch.zeros(3), torch.zeros(3)]
    plain = [1 - torch.tensor(x).sigmoid() for x in (0.5, -1.0, 1.5)]
    found = find("kto").figures_of(after, before, kto.with_weights(examples, (2.0, 0.5)), 0.5)
    assert found.loss == pytest.approx(float(2 * plain[0] + 0.5 * plain[1] + 2 * plain[2]) / 3)
    assert find("kto").figures_of(after, before, examples, 0.5).loss == pytest.approx(float(sum(plain)) / 3)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("task", "weights"),
    [
        pytest.param("dpo", (1.0, 1.0), marks=pytest.mark.nightly),
        ("kto", (1.0, 1.0)),
        pytest.param("kto", (1.5, 0.5), marks=pytest.mark.nightly),
    ],
)
def test_losses_of_training_are_those_of_trl(
    run: Run, llama: Path, tmp_path: Path, task: str, weights: tuple[float, float]
) -> None:
    """TRL reads the same rows as texts, in the order that our sampler draws them."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    rows = ROWS
    if task == "dpo":
        pairs = zip(ROWS[::2], ROWS[1::2], strict=True)
        rows = [{"prompt": a["prompt"], "chosen": a["completion"], "rejected": b["completion"]} for a, b in pairs]
    path, output = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "run"
    half = len(rows) // 2
    common = ("-m", llama, "-d", path, "--eval-data", path, "--method", "lora", "--set", "r=4", "--device", "cpu")
    more = ("--desirable-weight", weights[0], "--undesirable-weight", weights[1]) if task == "kto" else ()
    run("train", *common, *more, "-o", output, "--epochs", 2, "--batch-size", half, "--lr", "0.02", "--beta", "0.2")
    (state,) = (output / "checkpoints" / "checkpoint-4").glob("trainer_state.json")
    ours = [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]

    set_seed(0)
    model = peftcore.apply(AutoModelForCausalLM.from_pretrained(llama), "lora", r=4)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    order = LengthGroupedSampler([6] * len(rows), half, 0)
    drawn = [rows[i] for i in order]
    order.set_epoch(1)
    drawn += [rows[i] for i in order]
    settings = Settings(model="", data="", task=task, method="lora", lr=0.02, beta=0.2, batch_size=half, device="cpu")
    arguments = trainer_arguments.of_run(settings, tmp_path / "trl", 2 * len(rows))
    arguments.num_train_epochs, arguments.train_sampling_strategy = 1, "sequential"
    if task == "kto":
        arguments.desirable_weight, arguments.undesirable_weight = weights
    arguments.warmup_steps, arguments.eval_strategy, arguments.save_strategy = 1, "no", "no"
    kind = trl.KTOTrainer if task == "kto" else trl.DPOTrainer
    arguments_of_trainer = {"args": arguments, "train_dataset": Dataset.from_list(drawn), "processing_class": tokenizer}
    trainer = kind(model=model, ref_model=peftcore.reference_model(model), **arguments_of_trainer)
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(ours) == 4 and ours == pytest.approx(theirs, rel=1e-4) and ours[-1] < ours[0]
    if weights != (1.0, 1.0):
        assert adapter_task(output / "adapter").weights == weights
        after = json.loads((output / "result.json").read_text())["after"]["loss"]
        assert f"{after:.4f}" in run("eval", output, "-d", path).output
