"""The stages of measurements of `benchmarks/card.py`, with small sizes on the CPU, where times mean nothing."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 96,
    "max_position_embeddings": 512,
}


class Stages:
    """The modules of the stages, by name."""

    def __getattr__(self, name: str) -> ModuleType:
        return __import__(f"card_stages.{name}", fromlist=["name"])


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stages]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    found = Stages()

    def once(calls: Sequence[Callable[[], object]]) -> object:
        began = time.perf_counter()
        for call in calls:
            call()
        took = (time.perf_counter() - began) * 1e6
        return found.clock.Time(took, took)

    def captured(call: Callable[[], object]) -> tuple[object, object]:
        results = call()
        return type("Graph", (), {"replay": staticmethod(call)}), results

    for module in (found.timings, found.decoding):
        monkeypatch.setattr(module, "by_events", once)
    monkeypatch.setattr(found.timings, "int4_product", lambda out, width: lambda x: x.new_zeros(len(x), out))
    monkeypatch.setattr(found.tuning, "SHAPES", ((128, 256),))
    monkeypatch.setattr(found.timings, "in_graph", once)
    monkeypatch.setattr(found.timings, "l2_cache_bytes", lambda: 0)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(found.decoding, "captured", captured)
    for name in ("reset_peak_memory_stats", "synchronize", "max_memory_allocated", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    small = {"DEVICE": "cpu", "N": 128, "MANY": 520, "CLASSES": 96, "EXPERTS": (16, 64, 32)}
    for name, value in small.items():
        monkeypatch.setattr(found.timings, name, value)
    monkeypatch.setattr(found.timings, "rates", lambda: (100.0, 1.0))
    monkeypatch.setattr(found.models, "DEVICE", "cpu")
    monkeypatch.setattr(found.models, "SIZES", SIZES)
    monkeypatch.setattr(found.training, "LENGTH", 16)
    yield found
    for name in [name for name in sys.modules if name.partition(".")[0] == "card_stages"]:
        del sys.modules[name]


def run(
    stage: ModuleType, out: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str, seconds: float = 600
) -> list[dict]:
    """Return the rows that the stage adds."""
    results = out / "results.json"
    until = time.time() + seconds
    monkeypatch.setattr(sys, "argv", ["stage", "--results", str(results), "--until", str(until), *arguments])
    stage.main()
    rows = list(stage.Results(results))
    if seconds < 0:
        return rows
    missing = "liger_kernel is not installed"
    assert [row for row in rows if row["status"] != "measured" and row["detail"] != missing] == []
    before = results.read_text()
    stage.main()  # nothing runs again, but the card's rates
    assert [row for row in stage.Results(results) if row["stage"] != "timings"] == [
        row for row in rows if row["stage"] != "timings"
    ]
    assert results.read_text().startswith(before)
    return rows


def test_timings(stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_out = run(stages.timings, tmp_path, monkeypatch, seconds=-1)
    assert {row["detail"] for row in left_out if row["name"] != "rates of the card"} == {"the time was up"}
    rows = run(stages.timings, tmp_path, monkeypatch)
    assert {row["name"] for row in rows} == {row["name"] for row in left_out}
    measured = [row for row in rows if row["status"] == "measured"]
    assert all(row["values"]["lower bound, µs"] > 0 for row in measured if "label" in row)
    assert "| peftcore QLoRA |" in stages.report.measurements(measured)


def test_an_error_that_cuda_reports_again_is_a_fault(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    def launch() -> None:
        raise RuntimeError("lora_linear: CUDA reports 'unspecified launch failure' at a launch")

    row = stages.jobs.attempt(launch)
    assert (row["status"], row["fault"]) == ("failed", False)  # the GPU answers
    monkeypatch.setattr(stages.jobs, "synchronize", launch)
    assert stages.jobs.attempt(launch)["fault"] and stages.jobs.attempt(dict)["fault"]


def test_tuning(stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTCORE_CUDA_TUNING", "")
    work = stages.stages.SETTINGS[""]
    assert set(work) == set(stages.tuning.WORK)
    table = (BENCHMARKS.parent / "csrc" / "common" / "cuda_tuning.cu").read_text()
    assert all(f'"{setting.partition("=")[0]}"' in table for setting in stages.stages.SETTINGS if setting)
    rows = run(stages.tuning, tmp_path, monkeypatch, *work)
    assert {row["label"] for row in rows if "label" in row} == {"as built"}
    monkeypatch.setenv("PEFTCORE_CUDA_TUNING", "clusters=0")
    rows = run(stages.tuning, tmp_path, monkeypatch, "panel")
    groups = {row["group"]: row.get("label") for row in rows}
    assert groups["peftcore QLoRA, 128 x 256, 64 rows, bf16, rank 16, forward"] == "clusters=0"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, where peft asks it
def test_training(stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run(stages.training, tmp_path, monkeypatch)
    assert {row["name"] for row in rows} == {
        "peftcore LoRA",
        "peftcore QLoRA",
        "peft LoRA",
        "peftcore QLoRA, fused",
    }


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_decoding(stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run(stages.decoding, tmp_path, monkeypatch)
    assert len(rows) == 10 and all(row["values"]["largest difference of logits"] == 0 for row in rows)


def test_a_machine_without_what_the_build_takes(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = stages.machine
    assert machine.missing(tmp_path) == [] and machine.headers_missing() == ""
    monkeypatch.setattr(machine.metadata, "version", lambda name: "65.5.1")
    assert machine.missing(tmp_path) == ["setuptools>=77"]
    assert 'pip download --no-deps -d wheels "setuptools>=77"' in machine.how_to_carry(["setuptools>=77"], tmp_path)
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: str(tmp_path))
    assert machine.headers_missing().startswith(f"{tmp_path / 'Python.h'} not found")
