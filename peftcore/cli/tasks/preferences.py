"""Preference pairs for `--task dpo`: which of two answers to a prompt is better.

Rafailov et al. 2023, arXiv 2305.18290:

    loss = -log sigmoid(m),   m = beta ((log p(chosen) - log q(chosen)) - (log p(rejected) - log q(rejected)))

p is the model with its adapter; q is the frozen base, or the initial adapter if a run starts from one. The margin m is
positive if the model prefers the chosen answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from peftcore.cli.data.row import Row
from peftcore.cli.tasks import by_task, conversations
from peftcore.cli.tasks.conversations import IGNORED
from peftcore.cli.tasks.encoded_examples import Encoded, Example
from peftcore.cli.tasks.evaluation_mode import batched, evaluating
from peftcore.cli.tasks.metrics import Metrics
from peftcore.errors import PeftcoreError

BETA = 0.1
HAS_REFERENCE = True


def encode(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Return rows as `prompt_ids`, `chosen_ids` and `rejected_ids`; long prompts are cut at the beginning.

    Raises:
        PeftcoreError: a row has no tokens, or both answers have the same tokens; or in every row they begin to differ
            beyond `max_length`, where they are cut.
    """
    examples, truncated, left_out = [], 0, 0
    for row in rows:
        chosen, rejected = (answered(row, answer, tokenizer) for answer in (row.completion, row.rejected))
        begin = min(first_learned(chosen), first_learned(rejected))
        ids, others = chosen["input_ids"], rejected["input_ids"]
        prompt = next((i for i in range(begin) if ids[i] != others[i]), begin)  # tokens may merge across the boundary
        pair = (learned(chosen, prompt), learned(rejected, prompt))
        if pair[0] == pair[1]:
            raise PeftcoreError(
                f"{row.where}: 'chosen' and 'rejected' have the same tokens, so none can be preferred. Remove the row, "
                "or use a model whose tokenizer knows their words"
            )
        truncated += prompt + max(map(len, pair)) > max_length
        pair = (pair[0][: max_length - 1], pair[1][: max_length - 1])
        if pair[0] == pair[1]:
            left_out += 1
            continue
        kept = min(prompt, max_length - max(map(len, pair)))
        before = ids[prompt - kept : prompt]
        if not before:
            raise PeftcoreError(f"{row.where}: the prompt has no tokens")
        examples.append({"prompt_ids": before, "chosen_ids": pair[0], "rejected_ids": pair[1]})
    if not examples:
        raise PeftcoreError(f"no pair of answers differs within {max_length} tokens. Increase --max-length")
    return Encoded(examples, truncated, left_out)


def as_texts(examples: Sequence[Example]) -> list[Example]:
    """Return the chosen answers as examples of a language model, for methods that initialise from data."""
    return [joined(each, "chosen_ids") for each in examples]


def lengths(examples: Sequence[Example]) -> list[int]:
    """Return the number of tokens of the prompt with the longer answer."""
    return [len(e["prompt_ids"]) + max(len(e["chosen_ids"]), len(e["rejected_ids"])) for e in examples]


def pairs_at_once(batch_size: int, longest: int) -> int:
    """Return how many pairs to measure together, given a training batch: measuring needs whole logits."""
    return max(1, min(8, batch_size, 512 // longest))


Likelihoods = list[Tensor]  # per batch: log p of the chosen answers, then of the rejected ones


def figures(after: Likelihoods, before: Likelihoods, examples: Sequence[Example], beta: float) -> Metrics:
    """Return the loss over all pairs, the accuracy, and the mean margin, from likelihoods of model and reference."""
    margins = []
    for found, its in zip(after, before, strict=True):
        chosen, rejected = (found - its).chunk(2)
        margins.append(beta * (chosen - rejected))
    margin = torch.cat(margins)
    named = {"preference_accuracy": float((margin > 0).double().mean()), "margin": float(margin.mean())}
    return Metrics(float(-F.logsigmoid(margin).mean()), len(examples), named)


def likelihoods(
    model: nn.Module, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, batch_size: int = 8
) -> Likelihoods:
    """Return the log-likelihoods of both answers of every pair, in batches of similar lengths."""
    ordered = sorted(examples, key=lambda each: sum(map(len, each.values())))  # little padding
    found = []
    with evaluating(model):
        for pairs in batched(ordered, batch_size):
            answers = [joined(each, name) for name in ("chosen_ids", "rejected_ids") for each in pairs]
            found.append(log_likelihoods(model, answers, tokenizer))
    return found


def log_likelihoods(model: nn.Module, examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return log p of the learned tokens of each example, [examples], in float32."""
    batch = by_task.collator(tokenizer)(examples)
    device = next(model.parameters()).device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask", "labels")}
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    wanted = inputs["labels"][:, 1:]
    # Row by row: copies of all logits would need more memory than a training step, which has none.
    rows = zip(logits, wanted, strict=True)
    return -torch.stack([F.cross_entropy(x.float(), y, ignore_index=IGNORED, reduction="sum") for x, y in rows]).cpu()


def answered(row: Row, answer: Any, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Return the prompt with one of its answers, as an example for language modelling."""
    if row.messages is not None:
        begins = len(row.messages)
        asked = Row(row.where, "", messages=[*row.messages, *answer], learned_from=begins, tools=row.tools)
        (example,) = conversations.encode(asked, tokenizer)
        return example
    asked = Row(row.where, row.text, completion=answer)
    return by_task.encode([asked], "causal-lm", tokenizer, 1 << 30).examples[0]


def first_learned(example: Example) -> int:
    return next(i for i, label in enumerate(example["labels"]) if label != IGNORED)


def learned(example: Example, begin: int) -> list[int]:
    """Return the tokens from `begin` to the last learned one, without what a template writes after the answer."""
    end = max(i for i, label in enumerate(example["labels"]) if label != IGNORED)
    return list(example["input_ids"][begin : end + 1])


def joined(example: Example, answer: str) -> Example:
    prompt, ids = example["prompt_ids"], example[answer]
    return {"input_ids": prompt + ids, "labels": [IGNORED] * len(prompt) + ids}
