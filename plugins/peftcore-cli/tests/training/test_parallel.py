"""`peftcore train --parallel`: rank 0 prints, a run is resumed, a dead rank ends all ranks with its reason.

Ranks are forks with the variables of torchrun, since starting Python with transformers takes most of such a test.
`make test-all` starts them by torchrun itself.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import typer
from peftcore_cli import console
from peftcore_cli.training.torchrun import join
from safetensors.torch import load_file
from support import processes
from support.commands import Run, printed_without_pictures
from support.whole_run import WHOLE

from peftcore.errors import PeftcoreError

METHOD = ("--method", "lora", "--set", "r=4", "--set", "lora_alpha=8")
STEPS = ("--steps", 6, "--lr", "0.02", "--save-every", 5, "--eval-every", 6)  # an epoch has four


def torchrun(*arguments: Any, code: int = 0, ranks: int = 2) -> str:
    """`torchrun --nproc-per-node RANKS -m peftcore_cli ...`, and what it printed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launcher, "-m", "peftcore_cli", *map(str, arguments)]
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
        names = {path.name for path in (tmp_path / parallel / "checkpoints" / "checkpoint-5").iterdir()}
        assert {"rng_state_0.pth", "rng_state_1.pth", "complete.json", "adapter_model.safetensors"} <= names
        assert "model.safetensors" not in names
    for name, tensor in found["ddp"].items():
        torch.testing.assert_close(found["fsdp2"][name], tensor, atol=1e-5, rtol=1e-4)

    # Goes on within the second epoch as if the last step had not been lost.
    output = tmp_path / "fsdp2"
    for path in (output / "checkpoints" / "checkpoint-6").iterdir():
        path.unlink()
    text = on_two_ranks(*common, "-o", output, "--batch-size", 2, "--parallel", "fsdp2", "--resume")
    assert "checkpoint-6' is incomplete" in text and "resuming from" in text
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


@pytest.fixture
def whole_batches(reviews: Path) -> Path:
    """Sixteen reviews: ranks fill up the last step of an epoch with its first examples, one process does not."""
    lines = reviews.read_text().splitlines(keepends=True)
    reviews.write_text("".join([*lines, lines[0], lines[-1]]))
    return reviews


@pytest.mark.nightly
def test_a_run_is_resumed_on_another_number_of_ranks(
    run: Run, llama: Path, whole_batches: Path, tmp_path: Path
) -> None:
    data = ("-d", whole_batches, "--eval-data", whole_batches)
    common = ("train", "-m", llama, *data, *METHOD, "--steps", 12, "--lr", "0.02", "--save-every", 6)
    common += ("--batch-size", 2)
    torchrun(*common, "-o", tmp_path / "whole", "--parallel", "ddp")
    wanted = load_file(tmp_path / "whole" / "adapter" / "adapter_model.safetensors")
    for name in ("one", "four"):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / "checkpoint-12")
    text = run(*common, "-o", tmp_path / "one", "--resume").output
    assert "resuming on 1 ranks with --grad-accum 2, which keeps the number of examples per step" in text
    found = load_file(tmp_path / "one" / "adapter" / "adapter_model.safetensors")
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4)
    text = torchrun(*common, "-o", tmp_path / "four", "--resume", "--parallel", "fsdp2", code=1, ranks=4)
    assert "4 ranks cannot share equally. Resume on 1, 2" in text


@pytest.mark.nightly
def test_torchrun_restarts_a_run_of_which_a_rank_was_killed(llama: Path, whole_batches: Path, tmp_path: Path) -> None:
    data = ("-d", whole_batches, "--eval-data", whole_batches)
    common = ("train", "-m", llama, *data, *METHOD, "--steps", 60, "--save-every", 10, "--eval-every", 60)
    common += ("--batch-size", 2, "--parallel", "ddp", "--resume")
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    torchrun(*common, "-o", tmp_path / "whole")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launcher += ["--max-restarts", "1", "-m", "peftcore_cli"]
    command = [*launcher, *map(str, common), "-o", str(tmp_path / "killed")]
    with (tmp_path / "log").open("w") as log:
        started = psutil.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    until = time.monotonic() + 120
    while not (tmp_path / "killed" / "checkpoints" / "checkpoint-10" / "complete.json").exists():
        assert time.monotonic() < until and started.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    started.children()[0].kill()
    assert started.wait(120) == 0, (tmp_path / "log").read_text()
    assert "resuming from" in (tmp_path / "log").read_text()
    wanted, found = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "killed")
    )
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.nightly
def test_a_dead_rank_ends_all_with_its_reason(llama: Path, reviews: Path, tmp_path: Path) -> None:
    common = ("train", "-m", llama, "-d", reviews, "-o", tmp_path / "run", "--method", "lora")
    text = torchrun(*common, "--set", "r=nonsense", "--parallel", "ddp", code=1)
    assert "error: " in text and "nonsense" in text


@pytest.mark.nightly
@pytest.mark.parametrize("options", [("--bogus", 1), ("-m", "base", "-d", "none.jsonl", "--method", "lora")])
def test_an_error_of_all_ranks_is_printed_once(options: tuple[str, ...]) -> None:
    text = torchrun("train", *options, "-o", "run", "--parallel", "ddp", code=1)
    assert text.count("No such option") + text.count("does not exist") == 1


def test_an_error_of_one_rank_is_printed_by_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 is given time to fail first: torchrun ends the other ranks then."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(console, "_prefix", "rank 1: ")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    handler = signal.getsignal(signal.SIGTERM)
    for rank, waits in (("0", []), ("1", [console.RANK_0_TIMEOUT])):
        monkeypatch.setenv("RANK", rank)
        try:
            with pytest.raises(typer.Exit):
                console.fail("the disk of this rank is full")
        finally:
            signal.signal(signal.SIGTERM, handler)
        assert slept == waits
    assert capsys.readouterr().err.count("rank 1: error: the disk of this rank is full") == 2


def test_parallel_and_torchrun_go_together(
    run: Run, llama: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("train", "-m", llama, "-d", reviews, "-o", tmp_path / "run", *METHOD)
    assert "torchrun --nproc-per-node 2 -m peftcore_cli " in run(*common, "--parallel", "ddp", code=1).output
    assert "--parallel must be one of ddp, fsdp2, found 'tp'" in run(*common, "--parallel", "tp", code=1).output
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun has started 2 processes" in run(*common, code=1).output


@pytest.mark.parametrize(
    ("device", "local", "message"),
    [
        ("cuda:1", "0", r"so --device cuda:1 cannot select a single GPU.*CUDA_VISIBLE_DEVICES"),
        ("cuda", "2", r"process 3 on a machine with 2 GPUs\. Start fewer processes: .* --nproc-per-node 2"),
    ],
)
def test_each_process_has_a_card_of_its_own(
    device: str, local: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": local}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PeftcoreError, match=message):
        join("ddp", device)
