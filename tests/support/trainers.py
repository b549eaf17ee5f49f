"""A short run of transformers' Trainer on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

ROWS = [{"input_ids": torch.arange(3, 9) + index, "labels": torch.arange(3, 9) + index} for index in range(8)]
STEPS, LR, NORM = 3, 0.05, 2.0


def trainer(
    folder: Path, found: nn.Module, kind: type[Trainer] = Trainer, rows: list[Any] = ROWS, **changes: Any
) -> Trainer:
    """`STEPS` steps, each of all `rows` in one batch, at a constant rate."""
    settings = {"max_steps": STEPS, "learning_rate": LR, "lr_scheduler_type": "constant", "logging_steps": 1}
    settings |= {"max_grad_norm": NORM, "per_device_train_batch_size": 8, "save_strategy": "no"}
    settings |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
    return kind(found, TrainingArguments(str(folder), **{**settings, **changes}), train_dataset=rows, eval_dataset=rows)
