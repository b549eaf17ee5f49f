"""`--task orpo` and `--task reward`: losses by hand, and training as TRL's own trainers do it."""

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
from support.commands import Run, write_jsonl
from support.measured import measured

import peftcore
from peftcore import PeftcoreError

METHOD = ("--method", "lora", "--set", "r=4", "--device", "cpu")
ROWS = [
    {"prompt": f"the {word} is", "chosen": " very good", "rejected": rejected}
    for word in ("film", "story", "heart")
    for rejected in (" dull bad", " no fun")  # TRL tokenizes prompt and answer as one text
]
SETTINGS = {"model": "", "data": "", "method": "lora", "lr": 0.02, "batch_size": 3, "device": "cpu"}


@pytest.fixture
def examples(llama: Path, tmp_path: Path) -> Any:
    rows = row_reading.read_rows(write_jsonl(tmp_path / "few.jsonl", ROWS[:2]), "orpo")
    return find("dpo").encode(rows, models.load_tokenizer(str(llama)), 32).examples


def test_orpo_by_hand(llama: Path, examples: Any) -> None:
    tokenizer, model = models.load_tokenizer(str(llama)), models.load_model(str(llama), "orpo", device="cpu")

    @torch.no_grad()
    def logs(ids: list[int]) -> torch.Tensor:
        return model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

    odds, wholes = [], []
    for each in examples:
        means = []
        for name in ("chosen_ids", "rejected_ids"):
            found = logs(each["prompt_ids"] + each[name])
            means.append(found[-len(each[name]) :].mean().exp())
            wholes += [found] if name == "chosen_ids" else []
        odds.append(torch.log(means[0] / (1 - means[0]) / (means[1] / (1 - means[1]))))
    ratio = torch.stack(odds)
    wanted = -torch.cat(wholes).mean() - 0.3 * torch.nn.functional.logsigmoid(ratio).mean()
    for size in (1, 2):
        found = measured("orpo", model, examples, tokenizer, size, beta=0.3)
        assert found.loss == pytest.approx(float(wanted), rel=1e-4)
        assert found.figures["log_odds"] == pytest.approx(float(ratio.mean()), rel=1e-3, abs=1e-5)


def test_rewards_by_hand(llama: Path, examples: Any) -> None:
    tokenizer = models.load_tokenizer(str(llama))
    torch.manual_seed(0)
    model = models.load_model(str(llama), "reward", device="cpu")
    with torch.no_grad():
        chosen, rejected = (
            torch.cat([model(torch.tensor([each["prompt_ids"] + each[name]])).logits[0] for each in examples])
            for name in ("chosen_ids", "rejected_ids")
        )
    for size in (1, 2):
        found = measured("reward", model, examples, tokenizer, size)
        assert found.loss == pytest.approx(float(-(chosen - rejected).sigmoid().log().mean()), rel=1e-5)
        assert found.figures["margin"] == pytest.approx(float((chosen - rejected).mean()), rel=1e-4, abs=1e-6)


def test_reward_end_to_end(run: Run, llama: Path, tmp_path: Path) -> None:
    path, output = write_jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "run"
    arguments = ("-m", llama, "-d", path, "--eval-data", path, *METHOD, "--lr", 0.02, "--batch-size", 6)
    run("train", *arguments, "--task", "reward", "-o", output, "--steps", 4, "--eval-every", 4)
    found = json.loads((output / "result.json").read_text())
    assert found["after"]["preference_accuracy"] == 1.0 and found["after"]["loss"] < found["before"]["loss"]
    assert f"{found['after']['loss']:.4f}" in run("eval", output, "-d", path).output
    assert "which generates no text" in run("generate", output, "-p", "the", code=1).output
    assert "Use peftcore generate" not in run("predict", output, "-d", path, code=1).output
    wrong = run("train", *arguments, "--task", "reward", "--beta", 0.2, "-o", tmp_path / "no", code=1).output
    assert "--beta only works with dpo, image-dpo, kto, orpo and grpo" in wrong


def test_a_trl_without_orpo(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.setitem(__import__("sys").modules, "trl.experimental", None)
    with pytest.raises(PeftcoreError, match=r"--task orpo needs TRL's ORPOTrainer, which TRL .* Use --task dpo"):
        find("orpo").trl_classes()


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")  # TRL calls what transformers has deprecated, and its package experimental
@pytest.mark.parametrize("task", ["orpo", "reward"])
def test_losses_of_training_are_those_of_trl(run: Run, llama: Path, tmp_path: Path, task: str) -> None:
    """TRL reads the same rows as texts, in the order that our sampler draws them."""
    from datasets import Dataset
    from transformers import set_seed

    path, output = write_jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "run"
    common = ("-m", llama, "-d", path, "--eval-data", path, *METHOD, "--task", task)
    run("train", *common, "-o", output, "--epochs", 2, "--batch-size", 3, "--lr", "0.02")
    (state,) = (output / "checkpoints" / "checkpoint-4").glob("trainer_state.json")
    ours = [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
    order = LengthGroupedSampler([6] * len(ROWS), 3, 0)
    drawn = [ROWS[i] for i in order]
    order.set_epoch(1)
    drawn += [ROWS[i] for i in order]
    set_seed(0)
    model = peftcore.apply(models.load_model(str(llama), task, device="cpu"), "lora", r=4)
    tokenizer = models.load_tokenizer(str(llama))
    tokenizer.bos_token = None  # ORPOTrainer would add it to prompts, though the tokenizer does not
    arguments = trainer_arguments.of_run(Settings(**SETTINGS, task=task), tmp_path / "trl", 12)
    arguments.num_train_epochs, arguments.train_sampling_strategy = 1, "sequential"
    arguments.warmup_steps, arguments.eval_strategy, arguments.save_strategy = 1, "no", "no"
    if task == "orpo":
        arguments.max_length = 64
    kind = find(task).trl_classes()[0]
    trainer = kind(model=model, args=arguments, train_dataset=Dataset.from_list(drawn), processing_class=tokenizer)
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(ours) == 4 and ours == pytest.approx(theirs, rel=1e-4) and ours[-1] < ours[0]
