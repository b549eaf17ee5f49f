"""`compare`: rows, failures, what a second call keeps, and runs in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from peftcore_cli.settings import Settings, only_process
from peftcore_compare import command as compare, training_process
from peftcore_compare.report import ComparisonReport
from support.commands import Run

from peftcore import PeftcoreError

SIZE = ("--steps", 2, "--batch-size", 4, "--max-length", 16)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs need no process of their own here; the list has the folders of those that were run."""
    ran: list[str] = []

    def child(folder: Path, show: Any) -> int:
        ran.append(f"{folder.parent.name}/{folder.name}")
        return training_process.main(folder)

    monkeypatch.setattr(training_process, "run_child", child)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return ran


@pytest.mark.parametrize("option", ["--overwrite", "--resume"])
def test_one_process_compares_in_a_folder(run: Run, bert: Path, labelled: Path, tmp_path: Path, option: str) -> None:
    result = tmp_path / "runs" / "lora" / "seed-0" / "result.json"
    result.parent.mkdir(parents=True)
    result.write_text("{}")
    arguments = ("compare", "-m", bert, "-d", labelled, "-o", tmp_path, "--method", "lora", "--no-full", option)
    with only_process(tmp_path):  # a lock of another open file, as another process has it
        assert f"another process is writing to '{tmp_path}'" in run(*arguments, code=1).output
    assert result.read_text() == "{}"


@pytest.mark.pictures
def test_rows_failures_and_what_is_kept(
    run: Run, in_this_process: list[str], bert: Path, labelled: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    methods = ("--method", "lora r=2 lr=1e-2", "--method", "adapter bottleneck_size=64")
    arguments = ("compare", "-m", bert, "-d", labelled, "--eval-data", labelled, "-o", output, *SIZE)
    shown = run(*arguments, *methods, "--seeds", 2).output
    assert "bottleneck_size=64 is wider than" in shown and "4/6  lora r=2, seed 1: accuracy" in shown
    report = json.loads((output / "report.json").read_text())
    rows = {each["method"]: each for each in report["rows"]}
    assert list(rows) == ["lora r=2", "adapter bottleneck_size=64", "full"]
    assert rows["lora r=2"]["lr"] == 0.01 and rows["full"]["lr"] == compare.FULL_LEARNING_RATE
    lora, full = rows["lora r=2"]["runs"]["1"], rows["full"]["runs"]["1"]
    assert full["trainable_parameters"] == full["base_parameters"] > 15 * lora["trainable_parameters"]
    assert full["before"] == lora["before"], "the same head from the same seed"
    assert full["after"] != full["before"] and full["adapter_bytes"] > 4 * full["base_parameters"]
    assert set(rows["adapter bottleneck_size=64"]["runs"]["0"]) == {"error"}
    assert (output / "compare.png").read_bytes().startswith(b"\x89PNG")
    table = (output / "table.md").read_text()
    assert "| adapter bottleneck_size=64 | 0.003 | failed |" in table and "| accuracy | macro F1 |" in table
    assert "| most frequent label |  | 50.0 % |" in table
    answers = [row for row in table.partition("Predictions of lora r=2 ")[2].splitlines() if row.startswith("|")][2:4]
    assert sum(int(cell) for row in answers for cell in row.split("|")[2:-1]) == 32, "sixteen examples, two seeds"
    assert (output / "runs" / "lora r=2" / "seed-0" / "adapter" / "adapter_model.safetensors").exists()

    assert "already contains a comparison. Use --resume" in run(*arguments, *methods, code=1).output
    in_this_process.clear()
    run(*arguments, "--method", "lora r=2 lr=1e-2", "--method", "bitfit", "--no-full", "--seeds", 2, "--resume")
    assert in_this_process == ["bitfit/seed-0", "bitfit/seed-1"]
    changed = run(*arguments, "--method", "lora r=2 lr=2e-2", "--no-full", "--resume", code=1).output
    assert "has lr=0.01, but this command has lr=0.02" in changed
    run(*arguments, "--method", "lora r=2 lr=2e-2", "--no-full", "--seeds", 1, "--overwrite")
    assert [path.name for path in (output / "runs").iterdir()] == ["lora r=2"]

    in_this_process.clear()
    repeated = tmp_path / "again"
    run("compare", "--config", output / "compare.toml", "-o", repeated)
    assert in_this_process == ["lora r=2/seed-0"], "one seed, and not the whole model"
    first, second = (json.loads((each / "report.json").read_text())["rows"][0] for each in (output, repeated))
    assert first["runs"]["0"]["after"] == second["runs"]["0"]["after"] and second["lr"] == 0.02


def test_a_language_model_is_compared_by_its_loss(
    run: Run, in_this_process: list[str], llama: Path, reviews: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    run("compare", "-m", llama, "-d", reviews, "-o", output, *SIZE, "--method", "lora r=2", "--seeds", 1)
    table = (output / "table.md").read_text()
    actual = json.loads((output / "report.json").read_text())["rows"][0]["runs"]["0"]
    assert f"| lora r=2 | 0.001 | {actual['after']['loss']:.3f} |" in table and "| loss |" in table


def test_a_search_tries_the_same_rates_for_all_and_chooses_by_examples_that_none_trains_on(
    run: Run, in_this_process: list[str], bert: Path, labelled: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = ("compare", "-m", bert, "-d", labelled, "--eval-data", labelled, "-o", output, *SIZE, "--seeds", 2)
    methods = ("--method", "lora r=2", "--method", "adapter bottleneck_size=64", "--no-full")
    shown = run(*arguments, *methods, "--search", "lr=1e-2,1e-4", "--holdout", 0.25).output
    assert "1/6  lora r=2, lr 0.0001, seed 0: accuracy" in shown and "5/6  lora r=2, lr " in shown
    rows = {each["method"]: each for each in json.loads((output / "report.json").read_text())["rows"]}
    row = rows["lora r=2"]
    losses = {float(lr): each["validation"]["loss"] for lr, each in row["tried"].items()}
    assert set(losses) == {1e-4, 1e-2} and row["lr"] == min(losses, key=lambda lr: losses[lr])
    assert row["runs"]["0"] == row["tried"][f"{row['lr']:g}"] and "after" in row["runs"]["1"]
    every = len(labelled.read_text().splitlines())
    assert row["runs"]["0"]["train_rows"] == every - round(0.25 * every) and row["runs"]["0"]["eval_rows"] == every
    failed = rows["adapter bottleneck_size=64"]
    assert set(failed["runs"]) == {"0"} and "is wider than" in failed["runs"]["0"]["error"]
    table = (output / "table.md").read_text()
    low, high = (f"{loss:.3f}" for loss in (losses[1e-4], losses[1e-2]))
    cells = (f"**{low}**", high) if row["lr"] == 1e-4 else (low, f"**{high}**")
    assert f"| lora r=2 | {cells[0]} | {cells[1]} |" in table and "| failed | failed |" in table
    assert "| merges |" in table and " | yes |" in table

    in_this_process.clear()
    run(*arguments, *methods[:2], "--no-full", "--search", "lr=1e-4,1e-3,1e-2", "--holdout", 0.25, "--resume")
    assert in_this_process[0] == "lr-0.001/seed-0", "the others are kept"
    repeated = tmp_path / "again"
    run("compare", "--config", output / "compare.toml", "-o", repeated, "--seeds", 1)
    assert len(json.loads((repeated / "report.json").read_text())["rows"][0]["tried"]) == 3


@pytest.mark.parametrize(
    ("search", "methods", "message"),
    [
        ("r=4,8", None, "--search must be learning rates such as lr=1e-4,1e-3, found 'r=4,8'"),
        ("lr=fast", None, "must be different numbers above 0, found 'fast'"),
        ("lr=", None, "must be different numbers above 0, found ''"),
        ("lr=1e-3,nan", None, "must be different numbers above 0, found '1e-3,nan'"),
        ("lr=1e-3,0.001", None, "must be different numbers above 0, found '1e-3,0.001'"),
        ("lr=1e-3", ["lora r=4", "ia3 lr=1e-2"], "Remove the rate of --method 'ia3 lr=1e-2'"),
    ],
)
def test_wrong_searches(search: str, methods: list[str] | None, message: str) -> None:
    with pytest.raises(PeftcoreError, match=message):
        compare.parse_search(search, methods)


def test_a_rate_whose_loss_is_no_number_is_not_chosen() -> None:
    settings = Settings("m", "d.jsonl", "classification", "")
    report = ComparisonReport(settings, [("a", 1e-3), ("b", 1e-3)], [1e-3, 1e-2, 1e-1])
    for lr, loss in ((1e-3, 0.7), (1e-2, float("nan")), (1e-1, 0.6)):
        report.add("a", 0, fake(0.8, validation={"loss": loss}), lr)
        report.add("b", 0, {"error": "the loss is nan"}, lr)
    report.add("a", 1, fake(0.9), 1e-1)
    assert report.row("a").lr == 1e-1 and report.row("a").runs[0] == report.row("a").tried[1e-1]
    assert report.search_cells() == [
        ("method", "0.001", "0.01", "0.1"),
        ("a", "0.700", "failed", "**0.600**"),
        ("b", "failed", "failed", "failed"),
    ]
    assert report.failures() == [("b", "the loss is nan")]


def test_what_a_language_model_forgets(
    run: Run, in_this_process: list[str], llama: Path, reviews: Path, labelled: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("Shares fell.", "Rain is expected.")))
    output = tmp_path / "out"
    arguments = ("compare", "-m", llama, "-d", reviews, "-o", output, *SIZE, "--no-full", "--seeds", 1)
    run(*arguments, "--method", "lora r=2 lr=3e-2", "--method", "prompt-tuning", "--other-data", other)
    rows = json.loads((output / "report.json").read_text())["rows"]
    before, after = (each["loss"] for each in rows[0]["runs"]["0"]["other"])
    assert before != after and before == rows[1]["runs"]["0"]["other"][0]["loss"], "the base's, with either"
    table = (output / "table.md").read_text()
    assert f" | {after - before:+.3f} | yes |" in table and table.count(" | no |") == 1
    assert f'other_data = "{other}"' in (output / "compare.toml").read_text(), "a repeated comparison measures it, too"
    classes = ("compare", "-m", llama, "-d", labelled, "-o", tmp_path / "no", "--other-data", other)
    assert "--other-data only works with causal-lm" in run(*classes, code=1).output


def test_a_cut_off_comparison_goes_on(
    run: Run, in_this_process: list[str], bert: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_child = training_process.run_child
    arguments = ("compare", "-m", bert, "-d", labelled, "-o", tmp_path / "out", *SIZE, "--seeds", 1, "--no-full")
    methods = ("--method", "lora r=2", "--method", "bitfit")

    def stopped(folder: Path, show: Any) -> int:
        return run_child(folder, show) if "lora" in str(folder) else training_process.STOPPED_STATUS

    monkeypatch.setattr(training_process, "run_child", stopped)
    shown = run(*arguments, *methods, code=130).output
    assert "finished runs are in" in shown and "--resume" in shown
    monkeypatch.setattr(training_process, "run_child", run_child)
    in_this_process.clear()
    run(*arguments, *methods, "--resume")
    assert in_this_process == ["bitfit/seed-0"]


@pytest.mark.nightly
def test_runs_in_processes_of_their_own(bert: Path, labelled: Path, tmp_path: Path) -> None:
    """A signal asks the run at hand for a checkpoint, from which the next call goes on."""
    command = [sys.executable, "-m", "peftcore_cli", "compare", "-m", bert, "-d", labelled, "-o", tmp_path / "out"]
    command += ["--no-full", "--seeds", "1", "--method", "lora r=2", "--steps", "4000", "--batch-size", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, env=environment)
    folder = tmp_path / "out" / "runs" / "lora r=2" / "seed-0"
    log = folder / "log.txt"
    end = time.monotonic() + 120
    while not (log.exists() and "step 200/4000" in log.read_text()) and time.monotonic() < end:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    shown = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "--resume" in shown
    assert not (folder / "result.json").exists()
    states = [json.loads(path.read_text()) for path in folder.glob("checkpoints/*/trainer_state.json")]
    assert max(state["global_step"] for state in states) >= 200


def test_a_long_list_of_fields_is_a_folder_of_its_own(tmp_path: Path) -> None:
    labels = ["x token_indices=" + ",".join(map(str, range(start, start + 100))) for start in (1000, 2000)]
    labels.append("x target_modules=" + "ä" * 300)
    names = {compare.Candidate(label, "x", 1e-3).folder for label in labels}
    assert len(names) == 3
    for name in names:
        (tmp_path / name).mkdir()


def fake(accuracy: float, before: float = 0.5, **changes: Any) -> dict[str, Any]:
    figures = {"trainable_parameters": 1234, "adapter_bytes": 5000, "peak": {"memory": 10**9}, "step_seconds": 0.25}
    return {"before": {"accuracy": before}, "after": {"accuracy": accuracy}, "seconds": 3.0, **figures, **changes}


@pytest.mark.pictures
def test_mean_and_spread() -> None:
    report = ComparisonReport(Settings("m", "d.jsonl", "classification", ""), [("a", 1e-3), ("b", 0.3), ("late", 1.0)])
    values = (0.8, 0.9, 0.85)
    for seed, value in enumerate(values):
        report.add("a", seed, fake(value, before=0.4 + seed / 10, step_seconds=0.1 * (seed + 1)))
    report.add("b", 0, {"error": "it broke"})
    assert statistics.stdev(values) == pytest.approx(0.05)
    assert report.cells() == [
        ("before training", "", "50.0 ± 10.0 %", "", "", "", ""),
        ("a", "0.001", "85.0 ± 5.0 %", "1,234", "5.0 kB", "1.00 GB", "200 ms"),
        ("b", "0.3", "failed", "", "", "", ""),
    ]
    assert report.markdown().endswith("\n\nb failed: it broke\n")
    assert report.picture().startswith(b"\x89PNG")


def test_every_installed_method_and_the_whole_model_by_default() -> None:
    from peftcore.plugin.registry import registry

    candidates = compare.parse_candidates(None, full=True)
    assert [candidate.method for candidate in candidates] == [*registry.methods(), "full"]
    assert all(candidate.lr == registry.method(candidate.method).learning_rate for candidate in candidates[:-1])
    rates = compare.parse_candidates(["lora lr=1e-3", "lora lr=1e-4"], full=False)
    assert [candidate.label for candidate in rates] == ["lora lr=0.001", "lora lr=0.0001"]
    assert compare.parse_candidates(["full lr=1e-4"], full=True)[0].lr == 1e-4


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["lorra"], "no PEFT method 'lorra' is installed"),
        (["lora rank=4"], "LoraConfig has no field 'rank'"),
        (["lora r=four"], "'r' takes a whole number, found 'four'"),
        (["lora lr=fast"], "lr must be a number above 0 in --method 'lora lr=fast', found 'fast'"),
        (["lora lr=-1"], "lr must be a number above 0 in --method 'lora lr=-1', found '-1'"),
        (["lora lr=inf"], "lr must be a number above 0 in --method 'lora lr=inf', found 'inf'"),
        (["lora r=4", "lora r=4"], "'lora r=4 lr=0.001' is passed twice"),
        (["full r=4"], "full fine-tuning only takes lr in --method 'full r=4', found 'r=4'"),
        (["lora 'r=4"], "must be 'NAME FIELD=VALUE ...', found .*No closing quotation"),
        ([""], "must be 'NAME FIELD=VALUE ...', found ''"),
    ],
)
def test_wrong_methods(methods: list[str], message: str) -> None:
    with pytest.raises(PeftcoreError, match=message):
        compare.parse_candidates(methods, full=False)


def test_a_model_that_is_too_big_is_a_row_with_its_reason(
    run: Run, in_this_process: list[str], bert: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    output = tmp_path / "out"
    shown = run("compare", "-m", bert, "-d", labelled, "-o", output, *SIZE, "--method", "bitfit", "--seeds", 1).output
    assert "full, seed 0: failed: weights, gradients and AdamW's moments need" in shown
    assert in_this_process == ["bitfit/seed-0"]
