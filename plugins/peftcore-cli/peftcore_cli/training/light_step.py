"""Lighter training steps: fused operators, and the loss without logits, which is tested on a few rows first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import peftcore
from peftcore.errors import PeftcoreError
from peftcore_cli.amounts import format_counts
from peftcore_cli.bases import precision
from peftcore_cli.console import say
from peftcore_cli.settings import Settings
from peftcore_cli.tasks import encoded_examples, registered
from peftcore_cli.tasks.encoded_examples import Example
from peftcore_cli.tasks.task import Task

_ROWS, _TOKENS = 2, 64  # of the test batch


def fuse(model: PreTrainedModel, settings: Settings) -> None:
    """Fuse operators according to `settings`; `auto` fuses on CPUs unless the run is parallel."""
    if settings.fuse == "on" or (settings.fuse == "auto" and not settings.parallel and model.device.type == "cpu"):
        kinds = peftcore.summary(peftcore.fuse(model, recompute=settings.recompute)).fused  # type: ignore[arg-type]
        if kinds and settings.fuse == "auto":
            say(f"fused: {format_counts(kinds)} (--fuse auto)")


def use_loss_without_logits(
    model: PreTrainedModel, settings: Settings, rows: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Compute the loss without logits according to `settings`; `auto` tests it on a few rows first.

    Raises:
        PeftcoreError: the setting is `on`, and the loss needs the logits.
    """
    task = registered.find(settings.task)
    may = task.learns_texts and not settings.parallel
    if settings.without_logits == "off" or (settings.without_logits == "auto" and (not may or settings.teacher)):
        return
    try:
        with precision.autocast(settings.precision, model.device.type):
            peftcore.loss_without_logits(model, _few(model, rows, tokenizer, task))
    except PeftcoreError as error:
        if settings.without_logits == "on":
            raise
        say(f"the full logits are computed, because {error}")
    else:
        say(f"the loss is computed without the logits of a batch (--without-logits {settings.without_logits})")


def _last_tokens(row: Example) -> Example:
    """Return a row with its last tokens. Rows with images or audio cannot be truncated, and are returned unchanged."""
    if "images" in row or "audio" in row:
        return row
    size = len(row["input_ids"])
    return {
        name: value[-_TOKENS:] if isinstance(value, list) and len(value) == size else value
        for name, value in row.items()
    }


def _few(
    model: PreTrainedModel, rows: Sequence[Example], tokenizer: PreTrainedTokenizerBase, task: Task
) -> dict[str, Any]:
    """Return a batch of the last tokens of the first rows."""
    few = list(map(_last_tokens, rows[:_ROWS]))
    batch = encoded_examples.in_dtype(task.collate(few, tokenizer), model)
    return {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
