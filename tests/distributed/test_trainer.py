"""transformers' Trainer on a base that tensor parallelism divides over two ranks: as in one process."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from support.processes import run
from support.ranks import bases, trainer_runs
from support.ranks.work import farthest


@pytest.mark.nightly
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_trainer_trains_saves_and_resumes_under_tensor_parallelism(method: str, tmp_path: Path) -> None:
    bases.write(tmp_path)
    train = partial(run, trainer_runs.train, str(tmp_path), joined=False)
    (wanted,) = train(str(tmp_path / "one"), method, ranks=1)
    both, middle = str(tmp_path / "two"), str(tmp_path / "two" / "checkpoint-2")
    for found in train(both, method):
        assert farthest(found, wanted) < 1e-5  # at a rate of 0.05
    for count in (2, 1):
        for resumed in train(str(tmp_path / f"resumed by {count}"), method, middle, ranks=count):
            assert farthest(resumed, wanted) < 1e-5


@pytest.mark.nightly
def test_trainer_has_no_tensor_parallelism_on_cpus(tmp_path: Path) -> None:
    bases.write(tmp_path)
    for said in run(trainer_runs.train, str(tmp_path), str(tmp_path), "lora", None, True, joined=False):
        assert "does not support tensor parallelism on CPUs. Train on GPUs, or in a custom training loop" in said
