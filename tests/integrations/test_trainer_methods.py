"""Every method in transformers' Trainer, dense and in 4 bits: stopped and resumed it ends where a whole run does."""

from __future__ import annotations

from pathlib import Path

import pytest
import rank_cases
import rank_work
import torch
from trainers import trainer
from whole import nightly_but

from peftcore.testing import disturb

ROWS = [{"input_ids": row, "labels": row} for row in rank_work.TOKENS]
SETTINGS = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}


@pytest.mark.parametrize("case", nightly_but(rank_cases.CASES, rank_cases.KINDS))
def test_resume_is_exact(case: str, tmp_path: Path) -> None:
    """In the middle of an epoch, with what methods draw, average and schedule."""
    whole, resumed = rank_work.adapted(case), rank_work.adapted(case)
    before = rank_work.values(whole)
    first = trainer(tmp_path, whole, rows=ROWS, **SETTINGS)
    first.train()
    trained = rank_work.values(whole)
    still = [name for name in trained if torch.equal(trained[name], before[name])]
    assert not still, f"Trainer does not train {still}"

    disturb(resumed, "default", seed=9, std=0.05)  # from values that are not those of the first run
    second = trainer(tmp_path, resumed, rows=ROWS, **SETTINGS)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert rank_work.farthest(rank_work.values(resumed), trained) == 0
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (first, second)]
    assert losses[0] == losses[1] and len(losses[0]) == SETTINGS["max_steps"]
