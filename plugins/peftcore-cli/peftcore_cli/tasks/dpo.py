"""Direct preference optimization (`--task dpo`).

Rafailov et al. 2023, arXiv 2305.18290:

    loss = -log sigmoid(m),   m = beta ((log p(chosen) - log q(chosen)) - (log p(rejected) - log q(rejected)))

p is the model with its adapter; q is the frozen base, or the initial adapter if training continues from one. The margin
m is positive if the model prefers the chosen answer more than q does.
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
    """Preference pairs, trained on likelihoods relative to a reference model."""

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
        """Return the log-likelihoods of the chosen and rejected answers, for each batch of similar lengths."""
        sorted_examples = sorted(examples, key=lambda example: sum(map(len, example.values())))  # to reduce padding
        batches = []
        with evaluating(model):
            for pairs in batched(sorted_examples, batch_size):
                chosen_texts = [preferences.join_answer(pair, "chosen_ids") for pair in pairs]
                rejected_texts = [preferences.join_answer(pair, "rejected_ids") for pair in pairs]
                batches.append(preferences.log_likelihoods(model, chosen_texts + rejected_texts, processor))
        return batches

    def figures_of(
        self, policy: Likelihoods, reference: Likelihoods, examples: Sequence[Example], beta: float
    ) -> Metrics:
        return margins(policy, reference, len(examples), beta)


def margins(policy: Likelihoods, reference: Likelihoods, count: int, beta: float) -> Metrics:
    """Return the loss over all pairs, the accuracy and the mean margin, from likelihoods of model and reference."""
    batches = []
    for policy_batch, reference_batch in zip(policy, reference, strict=True):
        chosen_ratios, rejected_ratios = (policy_batch - reference_batch).chunk(2)
        batches.append(beta * (chosen_ratios - rejected_ratios))
    margin = torch.cat(batches)
    figures = {"preference_accuracy": float((margin > 0).double().mean()), "margin": float(margin.mean())}
    return Metrics(float(-F.logsigmoid(margin).mean()), count, figures)
