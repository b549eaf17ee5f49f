"""Preference pairs (`--task dpo`).

Rafailov et al. 2023, arXiv 2305.18290:

    loss = -log sigmoid(m),   m = beta ((log p(chosen) - log q(chosen)) - (log p(rejected) - log q(rejected)))

p is the model with its adapter; q is the frozen base, or the initial adapter if a run starts from one. The margin m is
positive if the model prefers the chosen answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from peftcore_cli.data.first_lines import FirstLines
from peftcore_cli.tasks import preferences
from peftcore_cli.tasks.encoded_examples import Example
from peftcore_cli.tasks.evaluation_mode import batched, evaluating
from peftcore_cli.tasks.judged import Likelihoods
from peftcore_cli.tasks.metrics import Metrics
from peftcore_cli.tasks.preferences import Preferences


class DPO(Preferences):
    """Preferences by likelihoods, in comparison with a reference."""

    name = "dpo"
    has_reference = True
    family = "writers"
    figures = ("preference_accuracy", "margin")
    step_loss = "dpo"

    def recognises(self, lines: FirstLines) -> bool:
        return not lines.are_labelled and lines.media is None and lines.have("chosen", "rejected")

    def likelihoods(
        self, model: nn.Module, examples: Sequence[Example], processor: Any, batch_size: int = 8
    ) -> Likelihoods:
        """Return the log-likelihoods of the chosen, then of the rejected answers, per batch of similar lengths."""
        ordered = sorted(examples, key=lambda each: sum(map(len, each.values())))  # little padding
        found = []
        with evaluating(model):
            for pairs in batched(ordered, batch_size):
                answers = [preferences.joined(each, name) for name in ("chosen_ids", "rejected_ids") for each in pairs]
                found.append(preferences.log_likelihoods(model, answers, processor))
        return found

    def figures_of(self, after: Likelihoods, before: Likelihoods, examples: Sequence[Example], beta: float) -> Metrics:
        return margins(after, before, len(examples), beta)


def margins(after: Likelihoods, before: Likelihoods, count: int, beta: float) -> Metrics:
    """Return the loss over all pairs, the accuracy, and the mean margin, from likelihoods of model and reference."""
    found = []
    for its, other in zip(after, before, strict=True):
        chosen, rejected = (its - other).chunk(2)
        found.append(beta * (chosen - rejected))
    margin = torch.cat(found)
    named = {"preference_accuracy": float((margin > 0).double().mean()), "margin": float(margin.mean())}
    return Metrics(float(-F.logsigmoid(margin).mean()), count, named)
