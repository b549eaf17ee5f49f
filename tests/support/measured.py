"""Examples measured by their task, as a run or `peftcore eval` measures them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peftcore_cli.bases.adapter_folders import AdapterTask
from peftcore_cli.tasks import registered
from peftcore_cli.tasks.encoded_examples import Example
from peftcore_cli.tasks.metrics import Metrics
from peftcore_cli.tasks.task import Evaluation
from torch import nn


def measured(
    task: str,
    model: nn.Module,
    examples: Sequence[Example],
    processor: Any,
    batch_size: int = 16,
    *,
    reward: Any = None,
    answer_tokens: int = 64,
    **about: Any,
) -> Metrics:
    """Return the metrics of `model` on `examples`; `about` are fields of the adapter's record."""
    record = AdapterTask(task, 512, **about)
    how = Evaluation(processor, record, batch_size, reward=reward, answer_tokens=answer_tokens)
    return registered.find(task).measure(model, examples, how)
