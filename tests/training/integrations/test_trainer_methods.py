"""Every method in transformers' Trainer, dense and in 4 bits: stopped and resumed it ends where a whole run does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.ranks import cases, work
from support.trainers import trainer
from support.whole_run import nightly_but

from peftcore.testing import disturb

ROWS = [{"input_ids": row, "labels": row} for row in work.TOKENS]
SETTINGS = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}


@pytest.mark.parametrize("case", nightly_but(cases.CASES, cases.KINDS))
def test_resume_is_exact(case: str, tmp_path: Path) -> None:
    """In the middle of an epoch, with what methods draw, average and schedule."""
    whole, resumed = work.adapted(case), work.adapted(case)
    before = work.values(whole)
    first = trainer(tmp_path, whole, rows=ROWS, **SETTINGS)
    first.train()
    trained = work.values(whole)
    still = [name for name in trained if torch.equal(trained[name], before[name])]
    assert not still, f"Trainer does not train {still}"

    disturb(resumed, "default", seed=9, std=0.05)  # from values that are not those of the first run
    second = trainer(tmp_path, resumed, rows=ROWS, **SETTINGS)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert work.farthest(work.values(resumed), trained) == 0
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (first, second)]
    assert losses[0] == losses[1] and len(losses[0]) == SETTINGS["max_steps"]
