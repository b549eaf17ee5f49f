"""Ranks of tests/distributed/test_trainer.py: transformers' Trainer on a base that tensor parallelism divides."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import ParallelismConfig
from torch import Tensor, distributed

import peftcore
from peftcore.testing import disturb
from support import trainers
from support.ranks import work
from support.ranks.bases import base

SETTINGS = {"save_strategy": "steps", "save_steps": 1, "adam_epsilon": 1e-3, "per_device_train_batch_size": 4}


def train(
    folder: str, run: str, method: str, resumed: str | None = None, checked: bool = False
) -> dict[str, Tensor] | str:
    """The adapter after Trainer's steps, or the error.

    Args:
        checked: by accelerate, which has no tensor parallelism on CPUs; the rest of it works there, too.
    """
    warnings.simplefilter("ignore")
    sizes = {}
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")
        sizes = {"tp_size": 2}
    found = base(folder, "blocks", **sizes)
    torch.manual_seed(7)
    fields: dict[str, Any] = {"blocksize": 32} if method == "qlora" else {}
    peftcore.apply(found, method, r=3, **fields)
    disturb(found, "default", seed=1, std=0.05)
    unchecked = mock.patch.object(ParallelismConfig, "_validate_accelerator", lambda *_: None)
    try:
        if checked:
            trainers.trainer(Path(run), found, **SETTINGS)
        with unchecked:
            trainer = trainers.trainer(Path(run), found, **SETTINGS)
    except peftcore.PeftcoreError as error:
        return str(error)
    trainer.train(resume_from_checkpoint=resumed)
    return work.values(found)
