"""`train --resume`: a run that was stopped goes on as if it had not been."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peftcore_cli import settings
from peftcore_cli.training import progress
from safetensors.torch import load_file
from support.commands import Run


def train_arguments(llama: Path, reviews: Path, output: Path) -> list[Any]:
    data = ("-m", llama, "-d", reviews, "-o", output, "--grad-accum", 2)
    dropout = ("--set", "lora_dropout=0.2")  # draws from the random state at every step
    method = ("--method", "lora", "--set", "r=4", "--set", "lora_alpha=8", *dropout)
    return ["train", *data, *method, "--steps", 8, "--batch-size", 2, "--lr", "0.02", "--save-every", 2]


def same_tensors(*runs: Path) -> bool:
    """Bit for bit the same adapter."""
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in runs)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def history(run: Path) -> list[dict[str, float]]:
    """What was logged at each step, times left out."""
    state = json.loads((run / "checkpoints" / "checkpoint-8" / "trainer_state.json").read_text())
    timed = {"train_runtime", "train_tokens_per_second"}
    return [{key: value for key, value in entry.items() if key not in timed} for entry in state["log_history"]]


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C during training step `step`."""
    original = progress.Meter.on_step_end

    def interrupting(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(progress.Meter, "on_step_end", interrupting)


def test_resume_is_bit_exact(
    run: Run, llama: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run(*train_arguments(llama, reviews, whole))
    with monkeypatch.context() as patch:
        interrupt_at(5, patch)
        patch.setattr(sys, "argv", ["peftcore", "train", "-o", "a folder"])
        stopped = run(*train_arguments(llama, reviews, parted), code=130).output
    assert f"stopped at step 5 of 8; the newest checkpoint is {parted / 'checkpoints' / 'checkpoint-5'}" in stopped
    assert "peftcore train -o 'a folder' --resume" in stopped
    assert not (parted / "adapter").exists()

    resumed = run(*train_arguments(llama, reviews, parted), "--resume").output
    assert f"resuming from {parted / 'checkpoints' / 'checkpoint-5'}" in resumed
    assert same_tensors(whole, parted)
    assert history(whole) == history(parted)


def test_a_checkpoint_that_was_cut_off_is_skipped(
    run: Run, llama: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run(*train_arguments(llama, reviews, whole))
    with monkeypatch.context() as patch:
        interrupt_at(5, patch)
        run(*train_arguments(llama, reviews, parted), code=130)
    file = parted / "checkpoints" / "checkpoint-5" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:100])
    resumed = run(*train_arguments(llama, reviews, parted), "--resume").output
    assert "checkpoint-5' is incomplete (optimizer.pt has 100 instead of" in resumed
    assert "checkpoint-4" in resumed
    for folder in (whole, parted):
        assert (folder / "checkpoints" / "checkpoint-8" / "complete.json").exists()
    assert same_tensors(whole, parted)


def test_a_run_is_continued_with_its_own_options(
    run: Run, llama: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run(*train_arguments(llama, reviews, whole))
    with monkeypatch.context() as patch:
        interrupt_at(5, patch)
        run(*train_arguments(llama, reviews, parted), code=130)
    assert "resuming from" in run("train", "--resume", "--output", parted).output
    assert same_tensors(whole, parted)
    error = run("train", "-o", parted, "--resume", "--batch-size", 4, code=1).output
    assert "has batch_size=2, but this command has batch_size=4" in error


def test_an_empty_folder_is_a_run_that_has_not_begun(run: Run, llama: Path, reviews: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    output = run(*train_arguments(llama, reviews, tmp_path / "run"), "--resume").output
    assert "has no complete checkpoint, so training starts from scratch" in output


@pytest.mark.parametrize("is_whole", [True, False])
def test_no_run_to_resume(run: Run, llama: Path, reviews: Path, tmp_path: Path, is_whole: bool) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    words = train_arguments(llama, reviews, tmp_path / "rnu") if is_whole else ["train", "-o", tmp_path / "rnu"]
    error = " ".join(run(*words, "--resume", code=2).stderr.replace("│", " ").split())
    assert "there is no run to resume" in error and "does not exist (nearest: 'run')" in error
    assert not (tmp_path / "rnu").exists()


@pytest.mark.parametrize("name", ["run.toml", "run.json"])
def test_a_pipe_in_the_folder_of_a_stranger(run: Run, llama: Path, reviews: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "run" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "run" / name)
    words = train_arguments(llama, reviews, tmp_path / "run")
    shown = run(*words, "--resume", code=2 if name == "run.toml" else 1).output
    assert "is a pipe, not a regular file" in " ".join(shown.replace("│", " ").split())


def test_two_processes_cannot_train_in_one_folder(run: Run, llama: Path, reviews: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = train_arguments(llama, reviews, output)
    run(*arguments)
    adapter = (output / "adapter" / "adapter_model.safetensors").read_bytes()
    with settings.only_process(output):  # a lock of another open file, as another process has it
        for option in ("--overwrite", "--resume"):
            assert f"another process is writing to '{output}'" in run(*arguments, option, code=1).output
    assert (output / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    run(*arguments, "--overwrite")


def test_a_folder_that_is_no_run_is_left_alone(run: Run, llama: Path, reviews: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").write_text("here")
    error = run(*train_arguments(llama, reviews, other), "--overwrite", code=1).output
    assert "contains files that do not belong to a run" in error and [file.name for file in other.iterdir()] == [
        "precious"
    ]
