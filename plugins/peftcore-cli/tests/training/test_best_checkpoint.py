"""`--load-best`, `--metric` and `--patience`: which adapter is saved, when training stops, and how a run resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peftcore_cli.settings import RunOptions
from peftcore_cli.training import best_checkpoint
from peftcore_cli.training.best_checkpoint import without_improvement
from safetensors.torch import load_file
from support import processes
from support.commands import Run, printed, write_jsonl
from transformers import Trainer

from peftcore import PeftcoreError

METHOD = ("--method", "lora", "--set", "r=4", "--device", "cpu")
OVERFITS = ("--lr", "0.05", "--steps", 12, "--batch-size", 4, "--eval-every", 1, "--scheduler", "constant")


@pytest.fixture
def contradicted(reviews: Path, tmp_path: Path) -> tuple[Any, ...]:
    """Held-out examples that contradict most of the training examples, so that their loss falls, then rises."""
    rows = [json.loads(line) for line in reviews.read_text().splitlines()]
    swapped = [{**row, "completion": rows[(i + 7) % 14]["completion"]} for i, row in enumerate(rows)]
    return ("-d", reviews, "--eval-data", write_jsonl(tmp_path / "held_out.jsonl", [*rows[:4], *swapped]))


def result_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "result.json").read_text())


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def losses(output: Path) -> dict[int, float]:
    (*_, last) = sorted((output / "checkpoints").iterdir(), key=lambda path: int(path.name.partition("-")[2]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_best_adapter_is_saved(run: Run, llama: Path, contradicted: Any, tmp_path: Path) -> None:
    output = tmp_path / "run"
    text = run("train", "-m", llama, *contradicted, "-o", output, *METHOD, *OVERFITS, "--load-best").output
    found, evaluated = result_of(output), losses(output)
    best = min(evaluated, key=evaluated.__getitem__)
    assert len(evaluated) == 12 and 1 <= best < 12 and found["steps"] == 12
    assert found["best"] == {"step": best, "metric": "loss", "value": evaluated[best], "stopped_early": False}
    assert found["after"]["loss"] == pytest.approx(evaluated[best], abs=1e-6)
    assert same(adapter_of(output / "adapter"), adapter_of(output / "checkpoints" / f"checkpoint-{best}"))
    assert not same(adapter_of(output / "adapter"), adapter_of(output / "checkpoints" / "checkpoint-12"))
    assert f"step {best}, with loss {evaluated[best]:.4f}" in text


def test_patience_stops_and_a_resumed_run_keeps_the_best_and_the_count(
    run: Run, llama: Path, contradicted: Any, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    arguments = ("train", "-m", llama, *contradicted, *METHOD, *OVERFITS, "--keep", 20, "--patience", 3)
    text = run(*arguments, "-o", whole).output
    found, evaluated = result_of(whole), losses(whole)
    best = min(evaluated, key=evaluated.__getitem__)
    assert found["best"]["step"] == best and found["best"]["stopped_early"]
    assert found["steps"] == best + 3 == max(evaluated), "it stops three evaluations after the best"
    assert "loss has not improved in 3 evaluations" in text

    # Interrupted after the second evaluation without improvement, and moved: it stops at the same step.
    parts = tmp_path / "parts"
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "adapter")
    shutil.rmtree(parts / "checkpoints" / f"checkpoint-{best + 3}")
    whole_adapter = adapter_of(whole / "adapter")
    shutil.rmtree(whole)
    run(*arguments, "-o", parts, "--resume")
    assert result_of(parts)["steps"] == best + 3 and result_of(parts)["best"] == found["best"]
    assert same(adapter_of(parts / "adapter"), whole_adapter)

    # A run that has stopped early does not take a step more.
    run(*arguments, "-o", parts, "--resume")
    assert result_of(parts)["steps"] == best + 3 and same(adapter_of(parts / "adapter"), whole_adapter)


def test_a_finished_run_takes_no_step_more(run: Run, llama: Path, reviews: Path, tmp_path: Path) -> None:
    arguments = ("train", "-m", llama, "-d", reviews, *METHOD, "--steps", 2, "--batch-size", 2, "-o", tmp_path / "run")
    run(*arguments)
    before = adapter_of(tmp_path / "run" / "adapter")
    run(*arguments, "--resume")
    assert result_of(tmp_path / "run")["steps"] == 2 and same(adapter_of(tmp_path / "run" / "adapter"), before)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_the_last_adapter_is_saved_if_no_checkpoint_could_be_written(
    run: Run, llama: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_a_full_disk(self: Trainer, folder: str) -> None:
        Path(folder, "optimizer.pt").symlink_to("/dev/full")
        save(self, folder)

    output, save = tmp_path / "run", Trainer._save_optimizer_and_scheduler
    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", on_a_full_disk)
    arguments = ("-m", llama, "-d", reviews, "-o", output, *METHOD, "--steps", 2, "--eval-every", 1, "--load-best")
    with pytest.warns(UserWarning, match="checkpoint-[12]' was not written, because the disk seems to be full"):
        text = " ".join(run("train", *arguments).output.split())
    assert "no checkpoint was written at an evaluation, so the last adapter is saved instead of the best" in text
    assert adapter_of(output / "adapter") and result_of(output)["best"] is None
    assert not list((output / "checkpoints").iterdir())


@pytest.mark.nightly
def test_another_metric(run: Run, bert: Path, labelled: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    data = ("-d", labelled, "--eval-data", labelled, "--metric", "accuracy", "--patience", 2)
    run("train", "-m", bert, *data, "-o", output, *METHOD, "--lr", "0.01", "--steps", 20, "--eval-every", 2)
    best = result_of(output)["best"]
    assert best["metric"] == "accuracy" and best["value"] == result_of(output)["after"]["accuracy"]
    assert best["value"] > result_of(output)["before"]["accuracy"]


@pytest.mark.nightly
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_ranks_stop_together(llama: Path, contradicted: Any, tmp_path: Path, parallel: str) -> None:
    arguments = ("train", "-m", llama, *contradicted, *METHOD, *OVERFITS, "--batch-size", 2, "--patience", 2)
    assert printed(*arguments, "-o", tmp_path / "alone", "--grad-accum", 2)[0] == 0
    command = map(str, (*arguments, "-o", tmp_path / "ranks", "--parallel", parallel))
    assert [code for code, _ in processes.run(printed, *command, joined=False)] == [0, 0]
    found, alone = result_of(tmp_path / "ranks"), result_of(tmp_path / "alone")
    assert found["best"]["stopped_early"] and found["steps"] == found["best"]["step"] + 2
    assert alone["best"]["stopped_early"]
    best = tmp_path / "ranks" / "checkpoints" / f"checkpoint-{found['best']['step']}"
    assert same(adapter_of(tmp_path / "ranks" / "adapter"), adapter_of(best))


def test_count_of_evaluations_without_improvement() -> None:
    nan = float("nan")
    assert without_improvement([], is_lower_better=True) == 0
    assert without_improvement([3.0, 2.0, 2.0, nan], is_lower_better=True) == 2
    assert without_improvement([0.1, 0.5, 0.4, 0.6], is_lower_better=False) == 0
    assert without_improvement([nan, nan], is_lower_better=False) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "loss"}, "it needs --load-best or --patience N"),
        (
            {"metric": "perplexty", "patience": 2},
            r"must be one of loss, perplexity, exact_match, .*, found 'perplexty' \(nearest: 'perplexity'\)",
        ),
        ({"load_best": True, "save_every": 4}, "so --save-every 4 contradicts --eval-every .the default.\\. Remove"),
    ],
)
def test_contradictions(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PeftcoreError, match=message):
        best_checkpoint.check(RunOptions(**options), "causal-lm")


def test_without_held_out_examples(run: Run, llama: Path, reviews: Path, tmp_path: Path) -> None:
    arguments = ("train", "-m", llama, "-d", reviews, *METHOD, "-o", tmp_path / "run")
    error = run(*arguments, "--load-best", "--holdout", 0, code=1).output
    assert "--holdout must be" in error and "--eval-data FILE" in error
