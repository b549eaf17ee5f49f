"""`suggest`: the ways it prints, and what it says to a wrong memory, card or model; `train --fit` takes the first."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from peftcore_cli.settings import Settings
from peftcore_cli.training import fitting, forecast
from support.commands import Run

import peftcore

ONE = ("--method", "lora", "--rank", 4, "--max-length", 12)


def test_prints_a_command_that_trains(run: Run, llama: Path, reviews: Path, tmp_path: Path) -> None:
    output = run("suggest", "-m", llama, "--memory", "4GB", *ONE, "--dtype", "bf16").output
    assert "fits into 4.0 GB on this machine, including Python and its libraries:" in output
    command = shlex.split(output.strip().splitlines()[-1])
    assert command[:4] == ["peftcore", "train", "-m", str(llama)] and command[-2:] == ["--dtype", "bf16"]
    assert command[command.index("--lr") + 1] == "0.001"
    given = [{"DATA": str(reviews), "RUN": str(tmp_path / "run")}.get(word, word) for word in command[1:]]
    assert "predicted peak: " in run(*given, "--steps", 1).output
    settings = json.loads((tmp_path / "run/run.json").read_text())
    assert (settings["method"], settings["fields"], settings["dtype"]) == ("lora", {"r": 4}, "bf16")


def test_on_a_card(run: Run, llama: Path) -> None:
    output = run("suggest", "-m", llama, "--device", "T4", "--memory", "1GB", *ONE).output
    assert "into 0.4 GB on t4:" in output and output.strip().endswith("--dtype bf16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "rtx4091"), "unknown device 'rtx4091' (nearest: 'rtx4090'"),
        (("--memory", "0"), "memory='0' is too small for any model"),
        (("--memory", "-3GB"), "memory must be a number of bytes or text such as '24GB', found '-3GB'"),
        (("--memory", "lots"), "memory must be a number of bytes or text such as '24GB', found 'lots'"),
        (("--memory", "24"), "memory='24' is too small for any model"),
        (
            ("--memory", "100MB"),
            "is no more than Python and its libraries take. Pass at least",
        ),  # how much depends on the process
        (("--memory", "8GB", "--dtype", "fp8"), "fp8"),
        (("--memory", "8GB", "--method", "loro"), "nearest: 'lora'"),
    ],
)
def test_what_it_does_not_understand(run: Run, llama: Path, arguments: tuple[str, ...], message: str) -> None:
    output = " ".join(run("suggest", "-m", llama, *ONE, *arguments, code=1).output.split())
    assert message in output


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4},
            "The hidden size (30) is not",
        ),
        ({"model_type": "llama", "vocab_size": -3}, "cannot build a model on the meta device from this LlamaConfig"),
        ({"model_type": "no_such_model"}, "the configuration of '"),
        (
            {"model_type": "llama", "quantization_config": {"quant_method": "aqlm"}},
            "the weights are quantized (aqlm), which cannot be estimated",
        ),
    ],
)
def test_configs_that_cannot_be_followed(run: Run, tmp_path: Path, config: dict[str, object], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    output = run("suggest", "-m", tmp_path, "--memory", "8GB", *ONE, code=1).output
    assert message in " ".join(output.split())


def test_train_takes_the_fastest_that_fits(run: Run, llama: Path, reviews: Path, tmp_path: Path) -> None:
    arguments = ("-m", llama, "-d", reviews, "--method", "lora", "--set", "r=4", "--steps", 1, "--max-length", 12)
    output = run("train", *arguments, "-o", tmp_path / "run", "--fit", "--batch-size", 2, "--grad-accum", 3).output
    assert "--fit chooses --batch-size 2 --grad-accum 3 --optim adamw_torch" in output
    settings = json.loads((tmp_path / "run/run.json").read_text())
    assert (settings["batch_size"], settings["grad_accum"], settings["gradient_checkpointing"]) == (2, 3, False)
    other = run("train", *arguments, "-o", tmp_path / "other", "--fit", "--optim", "lion_32bit", code=1).output
    assert "--fit chooses the optimizer" in other


def test_a_classifier_without_a_head(run: Run, bert: Path, labelled: Path, tmp_path: Path) -> None:
    """The folder is of a bare BERT: the task names the class that is trained."""
    arguments = ("-m", bert, "--method", "lora", "--max-length", 12)
    assert "twice the batch" in run("suggest", *arguments, "--memory", "4GB", "--labels", "up,down").output
    run("train", *arguments, "-d", labelled, "-o", tmp_path / "run", "--steps", 1, "--fit")


def test_the_command_says_how_it_runs(run: Run, llama: Path) -> None:
    pytest.importorskip("trl", minversion="1.16")  # whose releases need Python 3.11
    how = ("--parallel", "fsdp2", "--ranks", 2, "--precision", "bf16", "--task", "dpo")
    found = run(
        "suggest", "-m", llama, "--method", "lora", "--max-length", 12, "--memory", "2GB", "--device", "t4", *how
    )
    _, started, command = found.output.rpartition("torchrun --nproc-per-node 2 -m peftcore_cli train")
    assert started
    assert "--task dpo" in command and "--precision bf16 --parallel fsdp2" in command and "--dtype" not in command


def test_the_command_names_a_task_that_was_asked_for(run: Run, llama: Path, reviews: Path) -> None:
    """`train` reads the task off the data otherwise."""
    words = ("suggest", "-m", llama, *ONE, "--memory", "2GB", "--device", "t4", "-d", reviews)
    assert "--task causal-lm" in run(*words, "--task", "causal-lm").output
    assert "--task" not in run(*words).output


def test_fit_keeps_the_examples_of_a_step(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    way = SimpleNamespace(batch_size=4, optimizer="adamw_torch", gradient_checkpointing=False)
    monkeypatch.setattr(peftcore, "suggest", lambda *_, **__: SimpleNamespace(ways=[way]))
    settings = Settings(model=str(llama), data="d", task="causal-lm", method="lora", batch_size=6)
    found = fitting.fit(settings, [])
    assert (found.batch_size, found.grad_accum) == (3, 2)
    with pytest.raises(peftcore.PeftcoreError, match=r"divide the 7 examples per step, but only 4 fit into memory"):
        fitting.fit(replace(settings, task="kto", batch_size=7), [])
    assert fitting.fit(replace(settings, task="kto"), []).batch_size == 3


def test_train_says_what_does_not_fit_before_it_loads(
    run: Run, llama: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftcore.estimating import devices

    monkeypatch.setattr(devices, "memory_here", lambda: 2e5)
    monkeypatch.setattr(forecast, "memory_here", lambda: 2e5)
    arguments = ("train", "-m", llama, "-d", reviews, "-o", tmp_path / "run", "--method", "lora", "--max-length", 12)
    output = run(*arguments, "--fit", code=1).output
    assert "nothing fits into 0.2 MB beyond Python and its libraries: the smallest configuration is" in output
    assert "loading" not in output
    assert not (tmp_path / "run").exists()
