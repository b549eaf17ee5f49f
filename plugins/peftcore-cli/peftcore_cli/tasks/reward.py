"""Reward model, trained on preference pairs (`--task reward`).

Bradley and Terry 1952, as in Ouyang et al. 2022, arXiv 2203.02155:

    loss = -log sigmoid(r(chosen) - r(rejected))

r is the output of a new head at the last token of prompt and answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from peftcore_cli.settings import Settings
from peftcore_cli.tasks import text_examples
from peftcore_cli.tasks.encoded_examples import Example
from peftcore_cli.tasks.evaluation_mode import batched, evaluating
from peftcore_cli.tasks.judged import Likelihoods
from peftcore_cli.tasks.metrics import Metrics
from peftcore_cli.tasks.preferences import Preferences


class Reward(Preferences):
    """A base with a single output, the reward of an answer.

    `likelihoods` are the rewards of chosen and rejected answers, [examples, 2] per batch.
    """

    name = "reward"
    trl_name = "Reward"
    model_class = "AutoModelForSequenceClassification"
    new_head = True
    least_beta = None
    figures = ("preference_accuracy", "margin")
    sequences = 2
    answers_texts = generates = False
    no_chat = "is a reward model, which generates no text. Use peftcore eval"

    def head(self, labels: tuple[str, ...]) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def as_texts(self, examples: Sequence[Example]) -> list[Example]:
        """Return the chosen answers with a reward of 0, for methods that initialise from data."""
        return [{"input_ids": example["prompt_ids"] + example["chosen_ids"], "labels": 0.0} for example in examples]

    def likelihoods(
        self, model: nn.Module, examples: Sequence[Example], processor: Any, batch_size: int = 8
    ) -> Likelihoods:
        """Return the rewards of both answers of every pair."""
        device = next(model.parameters()).device
        batches, padding = [], processor.pad_token_id or 0
        with evaluating(model):
            for pairs in batched(examples, batch_size):
                chosen_answers = [pair["prompt_ids"] + pair["chosen_ids"] for pair in pairs]
                rejected_answers = [pair["prompt_ids"] + pair["rejected_ids"] for pair in pairs]
                answers = [{"input_ids": ids, "labels": 0.0} for ids in chosen_answers + rejected_answers]
                batch = text_examples.collate(answers, padding)
                inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
                batches.append(model(**inputs).logits[:, 0].float().cpu().view(2, -1).T)
        return batches

    def figures_of(
        self, policy: Likelihoods, reference: Likelihoods, examples: Sequence[Example], beta: float
    ) -> Metrics:
        """Return the loss over all pairs, the accuracy and the mean margin. `reference` and `beta` are not used."""
        chosen_rewards, rejected_rewards = torch.cat(policy).unbind(1)
        margin = chosen_rewards - rejected_rewards
        figures = {"preference_accuracy": float((margin > 0).double().mean()), "margin": float(margin.mean())}
        return Metrics(float(-F.logsigmoid(margin).mean()), len(examples), figures)

    def columns(self, examples: Sequence[Example]) -> list[Example]:
        """Return the examples with the columns of TRL's RewardTrainer, which have the prompt before each answer."""
        return [
            {name: example["prompt_ids"] + example[name] for name in ("chosen_ids", "rejected_ids")}
            for example in examples
        ]

    def arguments(self, settings: Settings) -> tuple[Any, dict[str, Any]]:
        kind, options = super().arguments(settings)
        return kind, {name: value for name, value in options.items() if name != "beta"}
