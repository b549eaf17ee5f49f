"""Preference pairs learned without a reference (`--task orpo`).

Hong et al. 2024, arXiv 2403.07691:

    loss = nll - beta log sigmoid(o),   o = log odds(chosen) - log odds(rejected),   odds(p) = p / (1 - p)

p is the geometric mean of the probabilities of an answer's tokens. nll is the mean over all tokens of the chosen
example, including its prompt, as TRL's ORPOTrainer has it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from peftcore.cli.tasks import preferences
from peftcore.cli.tasks.encoded_examples import Example
from peftcore.cli.tasks.evaluation_mode import batched, evaluating
from peftcore.cli.tasks.metrics import Metrics

HAS_REFERENCE = False
encode, lengths, as_texts = preferences.encode, preferences.lengths, preferences.as_texts

Likelihoods = list[Tensor]  # [examples, 3] per batch: mean log p of both answers, and log p of prompt and chosen answer


def likelihoods(
    model: nn.Module, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, batch_size: int = 8
) -> Likelihoods:
    """Return the mean log-likelihoods of both answers, and that of prompt and chosen answer."""
    found = []
    with evaluating(model):
        for pairs in batched(examples, batch_size):
            both = []
            for name in ("chosen_ids", "rejected_ids"):
                answers = preferences.log_likelihoods(model, [preferences.joined(e, name) for e in pairs], tokenizer)
                both.append(answers / torch.tensor([len(each[name]) for each in pairs]))
            whole = [{**each, "labels": list(each["input_ids"])} for each in as_texts(pairs)]
            found.append(torch.stack([*both, preferences.log_likelihoods(model, whole, tokenizer)], 1))
    return found


def figures(after: Likelihoods, before: Likelihoods, examples: Sequence[Example], beta: float) -> Metrics:
    """Return the loss over all pairs, the accuracy, and the mean log odds ratio; `before` is not used."""
    chosen, rejected, whole = torch.cat(after).double().unbind(1)
    odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    tokens = sum(len(each["prompt_ids"]) + len(each["chosen_ids"]) - 1 for each in examples)
    loss = -float(whole.sum()) / tokens - beta * float(F.logsigmoid(odds).mean())
    named = {"preference_accuracy": float((odds > 0).double().mean()), "log_odds": float(odds.mean())}
    return Metrics(loss, len(examples), named)


def columns(examples: Sequence[Example]) -> list[Example]:
    """Return examples with the columns of TRL's ORPOTrainer."""
    found = []
    for each in examples:
        row: Example = {"prompt_input_ids": each["prompt_ids"], "prompt_attention_mask": [1] * len(each["prompt_ids"])}
        for name in ("chosen", "rejected"):
            joined = preferences.joined(each, f"{name}_ids")
            row |= {f"{name}_{key}": value for key, value in joined.items()}
            row[f"{name}_attention_mask"] = [1] * len(joined["input_ids"])
        found.append(row)
    return found
