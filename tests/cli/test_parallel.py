"""`peftcore train --parallel`: rank 0 prints, a run is resumed, a dead rank ends all ranks with its reason.

Ranks are forks with the variables of torchrun, since starting Python with transformers takes most of such a test.
`make test-all` starts them by torchrun itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from commands import Run, printed_without_pictures
from safetensors.torch import load_file
from whole import WHOLE

METHOD = ("--method", "lora", "--set", "r=4", "--set", "lora_alpha=8")
STEPS = ("--steps", 4, "--lr", "0.02", "--save-every", 2, "--eval-every", 4)


def torchrun(*arguments: Any, code: int = 0) -> str:
    """`torchrun --nproc-per-node 2 -m peftcore ...`, and what it printed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "peftcore", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert (done.returncode == 0) == (code == 0), done.stdout + done.stderr
    return done.stdout + done.stderr


def on_two_ranks(*arguments: Any) -> str:
    """Run a command on two ranks, and return what both printed."""
    if WHOLE:
        return torchrun(*arguments)
    ended = processes.run(printed_without_pictures, *map(str, arguments), joined=False)
    text = "".join(output for _, output in ended)
    assert [code for code, _ in ended] == [0, 0], text
    return text


def losses(output: Path) -> tuple[float, float]:
    found = json.loads((output / "result.json").read_text())
    return found["before"]["loss"], found["after"]["loss"]


@pytest.mark.slow
def test_two_ranks_train_what_one_trains(run: Run, llama: Path, reviews: Path, tmp_path: Path) -> None:
    common = ("train", "-m", llama, "-d", reviews, "--eval-data", reviews, *METHOD, *STEPS)
    run(*common, "-o", tmp_path / "alone", "--batch-size", 4)
    found = {}
    for parallel in ("ddp", "fsdp2"):
        text = on_two_ranks(*common, "-o", tmp_path / parallel, "--batch-size", 2, "--parallel", parallel)
        assert text.count("before training") == 1 and text.count(" in each of 2 processes") == 1, text
        found[parallel] = load_file(tmp_path / parallel / "adapter" / "adapter_model.safetensors")
        before, after = losses(tmp_path / parallel)
        assert before == pytest.approx(losses(tmp_path / "alone")[0], abs=1e-5) and after < 0.9 * before
        names = {path.name for path in (tmp_path / parallel / "checkpoints" / "checkpoint-2").iterdir()}
        assert {"rng_state_0.pth", "rng_state_1.pth", "complete.json", "adapter_model.safetensors"} <= names
        assert "model.safetensors" not in names
    for name, tensor in found["ddp"].items():
        torch.testing.assert_close(found["fsdp2"][name], tensor, atol=1e-5, rtol=1e-4)

    # Goes on as if the last half had not been lost.
    output = tmp_path / "fsdp2"
    for path in (output / "checkpoints" / "checkpoint-4").iterdir():
        path.unlink()
    text = on_two_ranks(*common, "-o", output, "--batch-size", 2, "--parallel", "fsdp2", "--resume")
    assert "checkpoint-4' is incomplete" in text and "resuming from" in text
    again = load_file(output / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in found["fsdp2"].items())


@pytest.mark.nightly
def test_two_ranks_go_on_from_an_adapter(run: Run, llama: Path, reviews: Path, tmp_path: Path) -> None:
    first, data = tmp_path / "first", ("-d", reviews, "--eval-data", reviews)
    run("train", "-m", llama, *data, *METHOD, *STEPS, "-o", first, "--batch-size", 4)
    found = {}
    for parallel in ("ddp", "fsdp2"):
        output = tmp_path / parallel
        on_two_ranks("train", "-a", first, *data, *STEPS, "-o", output, "--batch-size", 2, "--parallel", parallel)
        before, after = losses(output)
        assert before == pytest.approx(losses(first)[1], abs=1e-5) and after < 0.9 * before
        found[parallel] = load_file(output / "adapter" / "adapter_model.safetensors")
    for name, tensor in found["ddp"].items():
        torch.testing.assert_close(found["fsdp2"][name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.nightly
def test_a_dead_rank_ends_all_with_its_reason(llama: Path, reviews: Path, tmp_path: Path) -> None:
    common = ("train", "-m", llama, "-d", reviews, "-o", tmp_path / "run", "--method", "lora")
    text = torchrun(*common, "--set", "r=nonsense", "--parallel", "ddp", code=1)
    assert "error: " in text and "nonsense" in text


def test_parallel_and_torchrun_go_together(
    run: Run, llama: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("train", "-m", llama, "-d", reviews, "-o", tmp_path / "run", *METHOD)
    assert "torchrun --nproc-per-node 2 -m peftcore" in run(*common, "--parallel", "ddp", code=1).output
    assert "--parallel must be one of ddp, fsdp2, found 'tp'" in run(*common, "--parallel", "tp", code=1).output
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun has started 2 processes" in run(*common, code=1).output
