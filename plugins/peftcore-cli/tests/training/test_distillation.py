"""`--teacher`: the loss has the divergence from another model's probabilities, over the learned tokens of a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peftcore_cli.data.row_reading import read_rows
from peftcore_cli.settings import Settings
from peftcore_cli.tasks.conversations import IGNORE_INDEX
from peftcore_cli.tasks.registered import find
from peftcore_cli.training import distillation
from peftcore_cli.training.sampler import LengthGroupedSampler
from support.commands import SPECIAL, WORDS, Run, save_tokenizer, write_jsonl
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainingArguments

import peftcore

OPTIONS = ("--method", "lora", "--set", "r=4", "--device", "cpu", "--fuse", "off", "--scheduler", "constant")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is narrower than the student, and whose table of embeddings has three rows more than its tokens."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(5)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(SPECIAL + WORDS) + 3, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data *= 40  # it is sure of its answers
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Answers of two to four tokens."""
    said = [
        {"prompt": f"the film is {word}", "completion": " ".join(["it"] * (1 + i % 3))} for i, word in enumerate(WORDS)
    ]
    return write_jsonl(tmp_path / "rows.jsonl", said)


def test_divergence() -> None:
    torch.manual_seed(0)
    logits, wanted = torch.randn(2, 5, 7), torch.randn(2, 5, 9)
    labels = torch.tensor([[IGNORE_INDEX, 3, 4, IGNORE_INDEX, 5], [1, 2, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]])
    right = 0.0
    for row, place in ((0, 0), (0, 1), (0, 3), (1, 0)):  # before the labels 3, 4, 5 and 2
        theirs, ours = wanted[row, place, :7].softmax(-1), logits[row, place].softmax(-1)
        right += float((theirs * (theirs / ours).log()).sum())
    assert float(distillation.divergence(logits, wanted, labels)) == pytest.approx(right, rel=1e-5)
    assert float(distillation.divergence(logits, logits, labels)) == pytest.approx(0, abs=1e-6)
    assert float(distillation.divergence(logits, wanted, torch.full((2, 5), IGNORE_INDEX))) == 0


def test_the_divergence_of_a_step_is_a_mean_over_the_tokens_of_all_processes(
    llama: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, knowing = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (llama, teacher))
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    row = {"input_ids": [4, 5, 6], "labels": [IGNORE_INDEX, 5, 6]}
    trainer = distillation.DistillingTrainer(
        student, arguments, train_dataset=[row], measure=print, lengths=[3], teacher=knowing, weight=0.25
    )
    monkeypatch.setattr(trainer.accelerator.state, "num_processes", 3)
    tokens = torch.tensor([[4, 5, 6]])

    def loss(labels: list[int], count: int | None) -> float:
        inputs = {"input_ids": tokens, "labels": torch.tensor([labels])}
        return trainer.compute_loss(student, inputs, num_items_in_batch=count).item()

    labels = torch.tensor([[IGNORE_INDEX, 5, 6]])
    with torch.no_grad():
        logits, wanted = student(tokens).logits, knowing(tokens).logits
    own = float(torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum"))
    total = 0.75 * own + 0.25 * float(distillation.divergence(logits, wanted, labels))
    assert loss([IGNORE_INDEX, 5, 6], 8) == pytest.approx(total / 8 * 3)
    assert loss([IGNORE_INDEX, 5, 6], None) == pytest.approx(total / 2)
    assert loss([IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX], 8) == 0
    trainer.args.average_tokens_across_devices = False
    assert loss([IGNORE_INDEX, 5, 6], 8) == pytest.approx(total / 8)


def test_a_teacher_of_packed_rows_is_tried_with_them(
    llama: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    monkeypatch.setattr(distillation.packing, "check", lambda model, examples, what: tried.append((examples, what)))
    tokenizer = find("causal-lm").load_processor(str(llama))
    common: dict[str, Any] = {"model": str(llama), "data": "d", "task": "causal-lm", "method": "lora"}
    common |= {"teacher": str(teacher), "dtype": "fp32", "device": "cpu"}
    for pack in (False, True):
        found = distillation.of_run(Settings(**common, pack=pack), tokenizer, [{"input_ids": [1, 2]}])
        assert found is not None and not any(p.requires_grad for p in found.parameters())
    assert tried == [([{"input_ids": [1, 2]}], "the teacher")]


@pytest.mark.parametrize("weight", [0.3, pytest.param(1.0, marks=pytest.mark.nightly)])
def test_losses_are_those_of_a_loop(weight: float, llama: Path, teacher: Path, rows: Path, run: Run) -> None:
    more = ("--teacher", teacher, "--teacher-weight", weight, "--batch-size", "2", "--grad-accum", "2", "--lr", "1e-2")
    output = rows.parent / "run"
    run("train", "--model", llama, "--data", rows, *OPTIONS, *more, "--steps", "2", "--eval-data", rows, "-o", output)
    log = json.loads(next((output / "checkpoints").glob("*-2/trainer_state.json")).read_text())["log_history"]
    ours = [each["loss"] for each in log if "loss" in each]

    tokenizer = find("causal-lm").load_processor(str(llama))
    examples = find("causal-lm").encode(read_rows(rows, "causal-lm"), tokenizer, 512).examples
    order = list(LengthGroupedSampler([len(each["input_ids"]) for each in examples], 2, 0))
    torch.manual_seed(0)
    student, knowing = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (llama, teacher))
    peftcore.apply(student, "lora", r=4)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    losses = []
    for step in range(2):
        batches = [[examples[i] for i in order[begin : begin + 2]] for begin in (4 * step, 4 * step + 2)]
        total: Any = 0
        count = sum(label != IGNORE_INDEX for batch in batches for each in batch for label in each["labels"])
        for batch in map(find("causal-lm").collator(tokenizer), batches):
            labels = batch.pop("labels")
            for row, place in (labels != IGNORE_INDEX).nonzero().tolist():
                theirs = knowing(**batch).logits[row, place - 1, : len(tokenizer)].softmax(-1).detach()
                logs = student(**batch).logits[row, place - 1].log_softmax(-1)
                away = (theirs * (theirs.log() - logs)).sum()
                total = total + weight * away - (1 - weight) * logs[labels[row, place]]
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_([p for p in student.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        losses.append(float(total.detach() / count))
    assert ours == pytest.approx(losses, rel=1e-4)
    assert "teacher =" in (output / "run.toml").read_text()


@pytest.mark.nightly
def test_a_student_comes_closer_to_its_teacher(llama: Path, teacher: Path, rows: Path, run: Run) -> None:
    """Also with virtual tokens, whose logits are not those of the teacher's input, and in packed rows."""
    for method, more in (("lora", ()), ("prompt-tuning", ()), ("lora", ("--pack",))):
        output = rows.parent / f"{method}{len(more)}"
        options = ("--method", method, "--lr", "3e-2", "--steps", "40", "--batch-size", "4", "--teacher-weight", "1")
        arguments = ("--device", "cpu", "--teacher", teacher, "-o", output, "--max-length", "64")
        run("train", "--model", llama, "--data", rows, *options, *arguments, *more)
        log = json.loads(next((output / "checkpoints").glob("*-40/trainer_state.json")).read_text())["log_history"]
        losses = [each["loss"] for each in log if "loss" in each]
        assert losses[-1] < 0.7 * losses[0], (method, losses)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--teacher-weight", "1.5"), "above 0 and at most 1, found 1.5"),
        (("--without-logits", "on"), "--teacher needs logits"),
    ],
)
def test_options_that_do_not_fit(
    options: tuple[str, ...], message: str, llama: Path, teacher: Path, rows: Path, run: Run
) -> None:
    arguments = ("--model", llama, "--data", rows, "--method", "lora", "-o", rows.parent / "run", "--teacher", teacher)
    assert message in run("train", *arguments, *options, code=1).output.replace("\n", " ")


def test_a_teacher_is_for_causal_lm(llama: Path, teacher: Path, tmp_path: Path, run: Run) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 8)
    arguments = ("--model", llama, "--data", pairs, "--method", "lora", "-o", tmp_path / "run", "--teacher", teacher)
    output = run("train", *arguments, "--task", "dpo", code=1).output.replace("\n", " ")
    assert "--teacher only works with causal-lm (the task is dpo)" in output


def test_a_weight_without_a_teacher_is_refused(llama: Path, rows: Path, run: Run) -> None:
    arguments = ("--model", llama, "--data", rows, "--method", "lora", "-o", rows.parent / "run")
    output = run("train", *arguments, "--teacher-weight", "2", code=1).output.replace("\n", " ")
    assert "--teacher-weight 2 has no effect without --teacher" in output and "loading" not in output


def test_teachers_that_do_not_fit(llama: Path, teacher: Path, rows: Path, tmp_path: Path, run: Run) -> None:
    arguments = ("--model", llama, "--data", rows, "--method", "lora", "--device", "cpu", "-o", tmp_path / "run")
    other = tmp_path / "other"
    other.mkdir()
    for file in teacher.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    swapped = (teacher / "tokenizer.json").read_text().replace('"film"', '"x"').replace('"story"', '"film"')
    (other / "tokenizer.json").write_text(swapped.replace('"x"', '"story"'))
    output = run("train", *arguments, "--teacher", other, code=1).output.replace("\n", " ")
    assert "and the model have different tokenizers: 2 of 23 tokens differ, such as 'film'" in output
    (other / "config.json").unlink()
    (other / "adapter_config.json").write_text("{}")
    assert "is an adapter, but the teacher must be a model" in run(
        "train", *arguments, "--teacher", other, code=1
    ).output.replace("\n", " ")
