"""Adapters under DeepSpeed's ZeRO-3 train as in one process, and are saved, restored and resumed whole.

Run where DeepSpeed is installed, which compiles a part of itself at the first call: `make test-engines`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from support import trainers
from support.processes import run
from support.ranks import bases, cases, work, zero3

import peftcore
from peftcore.engine import adapter_parameters

pytest.importorskip("deepspeed")


def test_a_step_of_every_method_is_that_of_one_process() -> None:
    for found in run(zero3.one_step_of_each, seconds=600):
        assert found.keys() == cases.CASES.keys()
        assert not {case: far for case, far in found.items() if isinstance(far, str) or far > 1e-6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    found = tmp_path_factory.mktemp("bases")
    bases.write(found)
    return str(found)


def test_a_step_of_every_method_on_a_base_that_was_partitioned_before(folder: str) -> None:
    for found in run(zero3.table_on_partitioned, folder, seconds=600):
        refused = str(found.pop("qlora"))
        assert "is partitioned by DeepSpeed's ZeRO-3" in refused and "load_sharded" not in refused
        assert not {case: far for case, far in found.items() if isinstance(far, str) or far > 1e-6}


def test_an_adapter_is_loaded_onto_a_partitioned_base(folder: str, tmp_path: Path) -> None:
    alone = bases.adapted(bases.base(folder, "llama"), "lora")
    peftcore.save(alone, tmp_path)
    for found in run(zero3.loaded_on_partitioned, folder, str(tmp_path), seconds=600):
        assert work.farthest(found, work.values(alone)) == 0


def test_what_methods_do_after_a_step() -> None:
    for found in run(zero3.projected, seconds=600):
        assert found["after"] < 1e-2 < found["before"]
    for told in run(zero3.without_gradients, seconds=600):
        assert "AdaLoRA reads gradients in after_step" in told and "peftcore.shard(model)" in told


def test_what_a_partitioned_model_refuses_and_counts() -> None:
    for told, counted, wanted in run(zero3.refused_and_counted, seconds=600):
        assert told["merge"].startswith("cannot merge: the model is sharded")
        assert "engine.save_checkpoint(folder)" in told["state"]
        assert counted == wanted


@pytest.mark.parametrize("threshold", [0, 100_000])  # above it nothing stays partitioned between calls
def test_a_partitioned_adapter_is_saved_whole_and_restored(tmp_path: Path, threshold: int) -> None:
    arguments = {"stage3_param_persistence_threshold": threshold}
    for stages in run(_saved_and_restored, str(tmp_path), arguments, seconds=600):
        loaded = peftcore.load(work.model(), tmp_path)
        assert work.farthest(dict(adapter_parameters(loaded, "default")), stages["saved"]) == 0
        assert work.farthest(stages["restored"], stages["saved"]) == 0
        assert work.farthest(stages["moved"], stages["saved"]) > 0.015  # two steps of 0.01
        # So the optimizer's float32 copy was restored, too: a step leads away from there, and not from "moved".
        assert work.farthest(stages["a step later"], stages["saved"]) < 0.012


def _saved_and_restored(folder: str, arguments: dict[str, int]) -> object:
    return zero3.saved_and_restored(folder, **arguments)


@pytest.mark.parametrize(("stage", "gather"), [(3, False), (3, True), (2, False)])
def test_trainer_saves_and_resumes(tmp_path: Path, stage: int, gather: bool) -> None:
    alone = work.adapted("lora")
    trainers.trainer(tmp_path / "alone", alone, **zero3.SMOOTH).train()
    wanted = work.values(alone)
    for resume in (False, True):
        losses, _ = run(zero3.trained_by_trainer, str(tmp_path), stage, gather, resume, seconds=600)
        assert len(losses) == 3
        loaded = peftcore.load(work.model(), tmp_path / "final")
        assert work.farthest(dict(adapter_parameters(loaded, "default")), wanted) < 1e-5
    shapes = {name: tensor.shape for name, tensor in load_file(tmp_path / "final/adapter_model.safetensors").items()}
    for number in (1, 2, 3):
        there = load_file(tmp_path / f"checkpoint-{number}/adapter_model.safetensors")
        assert {name: tensor.shape for name, tensor in there.items()} == shapes
