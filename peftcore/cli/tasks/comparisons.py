"""Tasks on judged answers, some against a reference, the model as it was: each a module with the same functions."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

import peftcore
from peftcore.cli import task_names
from peftcore.cli.tasks import image_preferences, odds, preferences, rewards, rollouts, unpaired
from peftcore.cli.tasks.encoded_examples import Example
from peftcore.cli.tasks.metrics import Metrics
from peftcore.engine import state_of

BETA = preferences.BETA


def of(task: str) -> Any:
    """Return the module of a task: `encode`, `lengths`, `likelihoods`, `figures` and `as_texts`."""
    pairs = {task_names.PREFERENCES: preferences, task_names.ODDS: odds, task_names.REWARD: rewards}
    pairs |= {task_names.IMAGE_PREFERENCES: image_preferences}
    return {**pairs, task_names.UNPAIRED: unpaired, task_names.ROLLOUTS: rollouts}[task]


def measure(
    task: str,
    model: nn.Module,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 8,
    *,
    beta: float | None = None,
    reference: Any = None,
    weights: Sequence[float] | None = None,
) -> Metrics:
    """Return the loss over all examples and the task's figures.

    Args:
        task: `dpo`, `image-dpo`, `kto`, `orpo` or `reward`.
        model: the model with its adapter.
        examples: encoded by the task's module.
        tokenizer: the tokenizer.
        batch_size: examples per batch.
        beta: weight that keeps the model close to the reference; None for the default.
        reference: `likelihoods` of the reference model in the same batches; None for the base.
        weights: weights of good and bad answers, for `kto`; None for 1.
    """
    module = of(task)
    if reference is None and module.HAS_REFERENCE:
        with peftcore.disabled(model) if state_of(model) is not None else contextlib.nullcontext():
            reference = module.likelihoods(model, examples, tokenizer, batch_size)
    after = module.likelihoods(model, examples, tokenizer, batch_size)
    if task == task_names.UNPAIRED:
        examples = unpaired.weighted(examples, weights)
    return module.figures(after, reference, examples, beta or BETA)
