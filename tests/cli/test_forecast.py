"""What `train` says of its memory before it loads, and what it refuses; what `plan` says of a step."""

import json
from pathlib import Path

import pytest
from commands import Run

from peftcore.cli import forecast

METHOD = ("--method", "lora", "--set", "r=4")


def test_plan_says_what_a_step_takes(run: Run, llama: Path) -> None:
    here = run("plan", "-m", llama, *METHOD, "--batch-size", 2, "--max-length", 12).output
    assert "a training step of LlamaForCausalLM, lora, batch 2 x 12" in here
    assert "peak" in here and "this machine (at rates measured here); fits into" in here
    card = run("plan", "-m", llama, *METHOD, "--max-length", 12, "--device", "rtx4090").output
    assert "on rtx4090 (by its data sheet, half of its rates, untested); fits into 22.1 GB" in card
    wrong = run("plan", "-m", llama, *METHOD, "--device", "rtx4091", code=1).output
    assert "there is no card 'rtx4091'" in wrong and "nearest: 'rtx4090'" in wrong


def test_what_will_not_fit_is_refused_before_it_loads(
    run: Run, llama: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "memory_here", lambda: 5e4)
    arguments = ("train", "-m", llama, "-d", reviews, "-o", tmp_path / "run", *METHOD, "--steps", 3, "--batch-size", 4)
    error = run(*arguments, code=1).output
    assert "needs about" in error and "loading" not in error
    assert "--batch-size 1 --grad-accum 4 or --gradient-checkpointing or --optim paged_adamw_8bit" in error
    assert "predicted peak" in run(*arguments, "--force").output
    found = json.loads((tmp_path / "run/result.json").read_text())
    assert found["predicted_peak"] == pytest.approx(found["peak"]["memory"], rel=0.2)
    assert 0 < found["peak_of_steps"] < 1.01 * found["peak"]["memory"]  # of which the kernel keeps two counts
    page = (tmp_path / "run/report.html").read_text()
    assert "<h2>Memory over a step</h2>" in page and "of what it was in a step" in page


def test_what_is_not_known_is_said(run: Run, llama: Path, reviews: Path, tmp_path: Path) -> None:
    arguments = ("train", "-m", llama, "-d", reviews, "-o", tmp_path / "run", *METHOD, "--steps", 1)
    output = run(*arguments, "--precision", "bf16").output
    assert "memory is not predicted: mixed precision is not followed" in output
