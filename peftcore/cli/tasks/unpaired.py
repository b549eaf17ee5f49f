"""Answers marked as good or bad for `--task kto`: no answer needs a counterpart.

Ethayarajh et al. 2024, arXiv 2402.01306, where w is --desirable-weight or --undesirable-weight:

    loss = w (1 - sigmoid(r - k)) for a good answer, w (1 - sigmoid(k - r)) for a bad one
    r = beta (log p(answer) - log q(answer)),   k = beta max(0, mean of log p - log q over mismatched answers)

p is the model with its adapter; q is the frozen base, or the initial adapter if a run starts from one. A mismatched
answer is that of the example before, in training of the batch, in measuring of all examples. The example of a batch of
one, such as the last of an epoch, has that of the example before it among all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from peftcore.cli.data.row import Row
from peftcore.cli.tasks import preferences
from peftcore.cli.tasks.encoded_examples import Encoded, Example
from peftcore.cli.tasks.evaluation_mode import batched, evaluating
from peftcore.cli.tasks.metrics import Metrics
from peftcore.errors import PeftcoreError

HAS_REFERENCE = True

Likelihoods = list[Tensor]  # log p of the answers, and of the mismatched answers


def encode(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Return rows as `prompt_ids`, `completion_ids` and `label`; long prompts are cut at the beginning.

    Raises:
        PeftcoreError: a row has no tokens.
    """
    examples, truncated = [], 0
    for row in rows:
        example = preferences.answered(row, row.completion, tokenizer)
        begin = preferences.first_learned(example)
        answer = preferences.learned(example, begin)
        truncated += begin + len(answer) > max_length
        answer = answer[: max_length - 1]
        prompt = example["input_ids"][max(0, begin + len(answer) - max_length) : begin]
        if not prompt:
            raise PeftcoreError(f"{row.where}: the prompt has no tokens")
        examples.append({"prompt_ids": prompt, "completion_ids": answer, "label": row.is_good})
    return Encoded(examples, truncated)


def refuse_one_mark(rows: Sequence[Row]) -> None:
    """Raise a PeftcoreError unless there are good and bad answers: KTO learns from the difference."""
    marks = {row.is_good for row in rows}
    if len(marks) < 2:
        mark, other = ("true", "false") if True in marks else ("false", "true")
        raise PeftcoreError(
            f"{rows[0].where}: every answer has the label {mark}, and --task kto needs both. Add answers with {other}, "
            "or train on the good answers alone, as prompts and completions"
        )


def weighted(examples: Sequence[Example], weights: Sequence[float] | None) -> list[Example]:
    """Return the examples with their weights, of which the first is that of good answers; None for 1."""
    good, bad = weights or (1.0, 1.0)
    return [{**each, "weight": good if each["label"] else bad} for each in examples]


def as_texts(examples: Sequence[Example]) -> list[Example]:
    """Return the good answers as examples of a language model, for methods that initialise from data."""
    good = [each for each in examples if each["label"]] or examples
    return [preferences.joined(each, "completion_ids") for each in good]


def lengths(examples: Sequence[Example]) -> list[int]:
    """Return the number of tokens of each prompt with its answer."""
    return [len(each["prompt_ids"]) + len(each["completion_ids"]) for each in examples]


def mismatched(examples: Sequence[Example]) -> list[Example]:
    """Return the examples, each with the answer of the one before as `KL_completion_ids`."""
    before = [examples[-1], *examples[:-1]]
    pairs = zip(examples, before, strict=True)
    return [{**each, "KL_completion_ids": other["completion_ids"]} for each, other in pairs]


def figures(after: Likelihoods, before: Likelihoods, examples: Sequence[Example], beta: float) -> Metrics:
    """Return the loss, the share of answers on the right side of `k`, the mean margin, and `k`."""
    rewards = beta * (after[0] - before[0])
    divergence = beta * (after[1] - before[1]).mean().clamp(min=0)
    good = torch.tensor([bool(each["label"]) for each in examples])
    distance = torch.where(good, rewards - divergence, divergence - rewards)
    both = bool(good.any()) and not bool(good.all())
    margin = float(rewards[good].mean() - rewards[~good].mean()) if both else 0.0
    named = {"accuracy": float((distance > 0).double().mean()), "margin": margin, "kl": float(divergence)}
    weights = torch.tensor([each.get("weight", 1.0) for each in examples])
    return Metrics(float((weights * (1 - distance.sigmoid())).mean()), len(examples), named)


def likelihoods(
    model: nn.Module, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, batch_size: int = 8
) -> Likelihoods:
    """Return the log-likelihoods of the answers and of the mismatched answers, each [examples]."""
    pairs = mismatched(examples)
    return [
        _log_likelihoods(model, [preferences.joined(each, name) for each in pairs], tokenizer, batch_size)
        for name in ("completion_ids", "KL_completion_ids")
    ]


def _log_likelihoods(
    model: nn.Module, examples: list[Example], tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> Tensor:
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))  # little padding
    found = torch.zeros(len(examples))
    with evaluating(model):
        for some in batched(order, batch_size):
            found[some] = preferences.log_likelihoods(model, [examples[i] for i in some], tokenizer)
    return found


def collator(tokenizer: Any) -> Any:
    """Return TRL's collator, after each example has the answer of the one before it in the batch.

    The example of a batch of one keeps its own `KL_completion_ids`.
    """
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    collate = DataCollatorForUnpairedPreference(pad_token_id=tokenizer.pad_token_id or 0)
    return lambda examples: collate(mismatched(examples) if len(examples) > 1 else examples)
