"""Preference pairs learned without a reference (`--task orpo`).

Hong et al. 2024, arXiv 2403.07691:

    loss = nll - beta log sigmoid(o),   o = log odds(chosen) - log odds(rejected),   odds(p) = p / (1 - p)

p is the geometric mean of the probabilities of an answer's tokens. nll is the mean over all tokens of the chosen
example, including its prompt, as TRL's ORPOTrainer has it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from peftcore.errors import PeftcoreError
from peftcore_cli.console import require
from peftcore_cli.settings import Settings
from peftcore_cli.tasks import preferences
from peftcore_cli.tasks.encoded_examples import Example
from peftcore_cli.tasks.evaluation_mode import batched, evaluating
from peftcore_cli.tasks.judged import Likelihoods
from peftcore_cli.tasks.metrics import Metrics
from peftcore_cli.tasks.preferences import Preferences


class ORPO(Preferences):
    """Preferences by odds, next to the likelihood of the chosen answer.

    `likelihoods` are [examples, 3] per batch: mean log p of both answers, and log p of prompt and chosen answer.
    """

    name = "orpo"
    family = "writers"
    figures = ("preference_accuracy", "log_odds")
    step_loss = "dpo"  # its step has the pairs of DPO's, and not more

    def likelihoods(
        self, model: nn.Module, examples: Sequence[Example], processor: Any, batch_size: int = 8
    ) -> Likelihoods:
        """Return the mean log-likelihoods of both answers, and that of prompt and chosen answer."""
        found = []
        with evaluating(model):
            for pairs in batched(examples, batch_size):
                both = []
                for name in ("chosen_ids", "rejected_ids"):
                    answers = preferences.log_likelihoods(
                        model, [preferences.joined(e, name) for e in pairs], processor
                    )
                    both.append(answers / torch.tensor([len(each[name]) for each in pairs]))
                whole = [{**each, "labels": list(each["input_ids"])} for each in self.as_texts(pairs)]
                found.append(torch.stack([*both, preferences.log_likelihoods(model, whole, processor)], 1))
        return found

    def figures_of(self, after: Likelihoods, before: Likelihoods, examples: Sequence[Example], beta: float) -> Metrics:
        """Return the loss over all pairs, the accuracy, and the mean log odds ratio; `before` is not used."""
        chosen, rejected, whole = torch.cat(after).double().unbind(1)
        odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
        tokens = sum(len(each["prompt_ids"]) + len(each["chosen_ids"]) - 1 for each in examples)
        loss = -float(whole.sum()) / tokens - beta * float(F.logsigmoid(odds).mean())
        named = {"preference_accuracy": float((odds > 0).double().mean()), "log_odds": float(odds.mean())}
        return Metrics(loss, len(examples), named)

    def columns(self, examples: Sequence[Example]) -> list[Example]:
        """Return examples with the columns of TRL's ORPOTrainer."""
        found = []
        for each in examples:
            row: Example = {
                "prompt_input_ids": each["prompt_ids"],
                "prompt_attention_mask": [1] * len(each["prompt_ids"]),
            }
            for name in ("chosen", "rejected"):
                joined = preferences.joined(each, f"{name}_ids")
                row |= {f"{name}_{key}": value for key, value in joined.items()}
                row[f"{name}_attention_mask"] = [1] * len(joined["input_ids"])
            found.append(row)
        return found

    def arguments(self, settings: Settings) -> tuple[Any, dict[str, Any]]:
        kind, more = super().arguments(settings)
        return kind, {**more, "max_length": settings.max_length}  # it reports a missing one

    def trl_classes(self) -> tuple[Any, Any]:
        require("trl", extra="dpo")
        import trl

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TRL calls its package experimental
            try:
                from trl.experimental import orpo
            except ImportError as error:
                raise PeftcoreError(
                    f"--task orpo needs TRL's ORPOTrainer, which TRL {trl.__version__} does not have: {error}. Use "
                    "--task dpo, or another release of trl"
                ) from error
        return orpo.ORPOTrainer, orpo.ORPOConfig
