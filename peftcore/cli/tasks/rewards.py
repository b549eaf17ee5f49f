"""A number for each answer, learned from preference pairs (`--task reward`).

Bradley and Terry 1952, as in Ouyang et al. 2022, arXiv 2203.02155:

    loss = -log sigmoid(r(chosen) - r(rejected))

r is the output of a new head at the last token of prompt and answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from peftcore.cli.tasks import by_task, preferences
from peftcore.cli.tasks.encoded_examples import Example
from peftcore.cli.tasks.evaluation_mode import batched, evaluating
from peftcore.cli.tasks.metrics import Metrics

HAS_REFERENCE = False
encode, lengths = preferences.encode, preferences.lengths

Likelihoods = list[Tensor]  # rewards [examples, 2] per batch, of chosen and rejected answers


def as_texts(examples: Sequence[Example]) -> list[Example]:
    """Return the chosen answers as examples with a number, for methods that initialise from data."""
    return [{"input_ids": each["prompt_ids"] + each["chosen_ids"], "labels": 0.0} for each in examples]


def likelihoods(
    model: nn.Module, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, batch_size: int = 8
) -> Likelihoods:
    """Return the rewards of both answers of every pair."""
    device = next(model.parameters()).device
    found = []
    with evaluating(model):
        for pairs in batched(examples, batch_size):
            answers = [each["prompt_ids"] + each[name] for name in ("chosen_ids", "rejected_ids") for each in pairs]
            batch = by_task.collator(tokenizer)([{"input_ids": ids, "labels": 0.0} for ids in answers])
            inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
            found.append(model(**inputs).logits[:, 0].float().cpu().view(2, -1).T)
    return found


def figures(after: Likelihoods, before: Likelihoods, examples: Sequence[Example], beta: float) -> Metrics:
    """Return the loss over all pairs, the accuracy, and the mean margin; `before` and `beta` are not used."""
    chosen, rejected = torch.cat(after).unbind(1)
    margin = chosen - rejected
    named = {"preference_accuracy": float((margin > 0).double().mean()), "margin": float(margin.mean())}
    return Metrics(float(-F.logsigmoid(margin).mean()), len(examples), named)


def columns(examples: Sequence[Example]) -> list[Example]:
    """Return examples with the columns of TRL's RewardTrainer: whole texts."""
    return [{name: each["prompt_ids"] + each[name] for name in ("chosen_ids", "rejected_ids")} for each in examples]
