"""Odds-ratio preference optimization, without a reference model (`--task orpo`).

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
from peftcore_cli.settings import RunOptions, Settings
from peftcore_cli.tasks import preferences
from peftcore_cli.tasks.encoded_examples import Example
from peftcore_cli.tasks.evaluation_mode import batched, evaluating
from peftcore_cli.tasks.judged import Likelihoods
from peftcore_cli.tasks.metrics import Metrics
from peftcore_cli.tasks.preferences import Preferences


class ORPO(Preferences):
    """Preference pairs, compared by their odds, with the likelihood of the chosen answer.

    `likelihoods` are [examples, 3] per batch: the mean log p of both answers, and log p of prompt and chosen answer.
    """

    name = "orpo"
    family = "writers"
    figures = ("preference_accuracy", "log_odds")
    step_loss = "dpo"  # a step has the same pairs as a DPO step

    def likelihoods(
        self, model: nn.Module, examples: Sequence[Example], processor: Any, batch_size: int = 8
    ) -> Likelihoods:
        """Return the mean log-likelihoods of both answers, and the log-likelihood of prompt and chosen answer."""
        batches = []
        with evaluating(model):
            for pairs in batched(examples, batch_size):
                columns = []
                for name in ("chosen_ids", "rejected_ids"):
                    answers = preferences.log_likelihoods(
                        model, [preferences.join_answer(pair, name) for pair in pairs], processor
                    )
                    columns.append(answers / torch.tensor([len(example[name]) for example in pairs]))
                texts = [{**example, "labels": list(example["input_ids"])} for example in self.as_texts(pairs)]
                batches.append(torch.stack([*columns, preferences.log_likelihoods(model, texts, processor)], 1))
        return batches

    def figures_of(
        self, policy: Likelihoods, reference: Likelihoods, examples: Sequence[Example], beta: float
    ) -> Metrics:
        """Return the loss over all pairs, the accuracy and the mean log odds ratio; `reference` is not used."""
        chosen_logps, rejected_logps, texts = torch.cat(policy).double().unbind(1)
        odds = (chosen_logps - rejected_logps) - (torch.log1p(-chosen_logps.exp()) - torch.log1p(-rejected_logps.exp()))
        tokens = sum(len(example["prompt_ids"]) + len(example["chosen_ids"]) - 1 for example in examples)
        loss = -float(texts.sum()) / tokens - beta * float(F.logsigmoid(odds).mean())
        figures = {"preference_accuracy": float((odds > 0).double().mean()), "log_odds": float(odds.mean())}
        return Metrics(loss, len(examples), figures)

    def columns(self, examples: Sequence[Example]) -> list[Example]:
        """Return examples with the columns of TRL's ORPOTrainer."""
        rows = []
        for example in examples:
            row: Example = {
                "prompt_input_ids": example["prompt_ids"],
                "prompt_attention_mask": [1] * len(example["prompt_ids"]),
            }
            for name in ("chosen", "rejected"):
                full_example = preferences.join_answer(example, f"{name}_ids")
                row |= {f"{name}_{key}": value for key, value in full_example.items()}
                row[f"{name}_attention_mask"] = [1] * len(full_example["input_ids"])
            rows.append(row)
        return rows

    def check_options(self, run_options: RunOptions, data: Sequence[str], *, continues: bool) -> None:
        if run_options.streaming:
            raise PeftcoreError(
                "--streaming does not work with --task orpo, because TRL's ORPOTrainer processes all examples before "
                "training. Remove --streaming, or use --task dpo"
            )

    def as_dataset(self, examples: Sequence[Example]) -> Any:
        """Return the examples as a `datasets.Dataset` in memory, which TRL's ORPOTrainer processes before training."""
        import datasets

        return datasets.Dataset.from_list(self.columns(examples))

    def arguments(self, settings: Settings) -> tuple[Any, dict[str, Any]]:
        kind, options = super().arguments(settings)
        return kind, {**options, "max_length": settings.max_length}  # TRL warns if this argument is missing

    def trl_classes(self) -> tuple[Any, Any]:
        require("trl", extra="dpo")
        import trl

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TRL's package of this trainer is experimental
            try:
                from trl.experimental import orpo
            except ImportError as error:
                raise PeftcoreError(
                    f"--task orpo needs TRL's ORPOTrainer, which TRL {trl.__version__} does not have: {error}. Use "
                    "--task dpo, or another release of trl"
                ) from error
        return orpo.ORPOTrainer, orpo.ORPOConfig
