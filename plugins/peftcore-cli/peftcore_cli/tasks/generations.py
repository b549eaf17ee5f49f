"""Answers to held-out examples and their metrics: exact match, ROUGE-L, or a function of the user's own.

An answer is generated greedily. Prompts of one length are answered together, so that none is padded.

ROUGE-L (Lin 2004) is the F1 of the longest common subsequence of words, here runs of letters and digits in lower case,
averaged over examples.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from peftcore.errors import PeftcoreError
from peftcore_cli.data.row import Row
from peftcore_cli.tasks import conversations, positions, registered
from peftcore_cli.tasks.evaluation_mode import batched, evaluating
from peftcore_cli.tasks.metrics import Metrics
from peftcore_cli.tasks.text_generation import ends

if TYPE_CHECKING:
    from peftcore_cli.tasks.task import Task

FIGURES = ("exact_match", "rouge_l")
COUNT = 100  # answers in each evaluation by default

Metric = Callable[[list[str], list[str]], float]
Reward = Callable[..., list[float | None]]


@dataclass(frozen=True)
class Case:
    """A prompt as token ids, and the answer that is wanted."""

    ids: list[int]
    wanted: str


def is_own(metric: str | None) -> bool:
    """Return whether `metric` is FILE.py:FUNCTION."""
    return metric is not None and ".py:" in metric


def name_of(metric: str) -> str:
    """Return the name of a metric in reports: that of the function for FILE.py:FUNCTION."""
    return metric.rpartition(":")[2] if is_own(metric) else metric


def count(task: Task, metric: str | None, given: int | None) -> int:
    """Return how many held-out examples are answered in each evaluation, given --metric and --eval-answers.

    Raises:
        PeftcoreError: the model of this task writes no answers.
    """
    if not task.writes:
        if given is not None or is_own(metric):
            raise PeftcoreError(
                f"--eval-answers and a --metric FILE.py:FUNCTION are for {registered.named_by('writes')}, found "
                f"{task.name}. Leave them out"
            )
        return 0
    needed = is_own(metric) or metric in FIGURES
    return given if given is not None else COUNT if needed else 0


def load_function(text: str, option: str = "--metric") -> Callable[..., Any]:
    """Return the function that FILE.py:FUNCTION names, by running the file.

    Raises:
        PeftcoreError: the file cannot be run, or has no such function.
    """
    path, _, name = text.rpartition(":")
    file = Path(os.path.expanduser(path))
    if not file.is_file():
        raise PeftcoreError(f"{option} {text}: the file '{path}' does not exist. Pass FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(f"peftcore_user_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise PeftcoreError(f"{option} {text}: '{path}' is not a Python file. Pass FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise PeftcoreError(f"{option} {text}: '{path}' fails with {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise PeftcoreError(f"{option} {text}: '{path}' has no function '{name}'")
    return found


def load_reward(text: str) -> Reward:
    """Return the function FILE.py:FUNCTION, whose results are checked when it is called.

    Raises:
        PeftcoreError: the file or the function does not exist.
    """
    if not is_own(text):
        raise PeftcoreError(f"--reward must be FILE.py:FUNCTION, found '{text}'")
    function = load_function(text, "--reward")

    @functools.wraps(function)
    def checked(**columns: Any) -> list[float | None]:
        try:
            found = function(**columns)
        except Exception as error:
            raise PeftcoreError(
                f"--reward {text} fails with {type(error).__name__}: {error}. It is called with prompts, completions, "
                "completion_ids, the columns of the rows and more by name: accept **kwargs"
            ) from error
        count = len(columns["completions"])
        values = list(found) if isinstance(found, (list, tuple)) else []
        if len(values) != count or not all(map(_is_reward, values)):
            raise PeftcoreError(
                f"--reward {text} must return a list of {count} finite numbers, one for each answer, found "
                f"{str(found)[:80]}"
            )
        return [None if value is None else float(value) for value in values]

    return checked


def _is_reward(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and math.isfinite(value))


def cases(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Case]:
    """Return the prompts of rows and their answers; of a conversation, the last turn that is learned.

    Raises:
        PeftcoreError: a row has no prompt, or its prompt is longer than `max_length` tokens.
    """
    found = []
    for row in rows:
        if row.messages is not None:
            turns = [i for i, m in enumerate(row.messages) if m["role"] == "assistant" and i not in row.not_learned]
            prompt = conversations.rendered(tokenizer, row.messages[: turns[-1]], row.tools, begins_answer=True)
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            wanted = str(row.messages[turns[-1]].get("content") or "")
        elif isinstance(row.completion, str):
            ids, wanted = tokenizer(row.text)["input_ids"], row.completion
        else:
            raise PeftcoreError(
                f"{row.where}: {row.kind} has no prompt to answer. Metrics of answers need prompt/completion, messages "
                "or source/target; leave out --eval-answers, or choose by --metric loss"
            )
        if not 0 < len(ids) <= max_length:
            raise PeftcoreError(
                f"{row.where}: the prompt has {len(ids):,} tokens; to be answered it needs 1 to {max_length:,} "
                "(--max-length). Increase it, or remove the example"
            )
        found.append(Case(list(ids), wanted))
    return found


def answer(
    model: Any, some: Sequence[Case], tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, batch_size: int = 8
) -> list[str]:
    """Return the model's answers in the order of the cases; no random numbers are drawn."""
    device = next(model.parameters()).device
    by_length: dict[int, list[int]] = {}
    for i, case in enumerate(some):
        by_length.setdefault(len(case.ids), []).append(i)
    found = [""] * len(some)
    with evaluating(model), positions.of_answers(model, "--answer-tokens"):
        for size, places in sorted(by_length.items()):
            for batch in batched(places, batch_size):
                ids = torch.tensor([some[i].ids for i in batch], device=device)
                tokens = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=ends(model, tokenizer),
                )
                answers = tokens if model.config.is_encoder_decoder else tokens[:, size:]
                for i, text in zip(batch, tokenizer.batch_decode(answers, skip_special_tokens=True), strict=True):
                    found[i] = text
    return found


def figures(answers: Sequence[str], some: Sequence[Case], metric: str | None, own: Metric | None) -> dict[str, float]:
    """Return the figures of answers: the user's first, then exact match and ROUGE-L.

    Raises:
        PeftcoreError: the user's function fails, or returns something other than a finite number.
    """
    wanted = [case.wanted for case in some]
    found: dict[str, float] = {}
    if own is not None and metric is not None:
        found[name_of(metric)] = _of_user(metric, own, list(answers), wanted)
    pairs = list(zip(answers, wanted, strict=True))
    found["exact_match"] = sum(one.strip() == other.strip() for one, other in pairs) / len(pairs)
    found["rouge_l"] = sum(rouge_l(one, other) for one, other in pairs) / len(pairs)
    return found


def _of_user(metric: str, own: Metric, answers: list[str], wanted: list[str]) -> float:
    try:
        value = own(answers, wanted)
    except Exception as error:
        raise PeftcoreError(
            f"--metric {metric} fails with {type(error).__name__}: {error}. It is called with two lists of texts, the "
            "answers and what is wanted"
        ) from error
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise PeftcoreError(f"--metric {metric} must return a finite number, the higher the better, found {value!r}")
    return float(value)


def rouge_l(answer: str, wanted: str) -> float:
    """Return the ROUGE-L F1 of two texts, 1 if both have no words."""
    one, other = (re.findall(r"[^\W_]+", text.lower()) for text in (answer, wanted))
    if not one or not other:
        return float(one == other)
    before = [0] * (len(other) + 1)
    for word in one:
        row = [0]
        for j, each in enumerate(other):
            row.append(before[j] + 1 if word == each else max(before[j + 1], row[j]))
        before = row
    return 2 * before[-1] / (len(one) + len(other))


class Answering:
    """Adds the figures of answers to held-out metrics.

    Args:
        rows: held-out examples, of which the first `count` are answered.
        tokenizer: the tokenizer.
        metric: value of `--metric`.
        count: number of examples.
        max_length: tokens of a prompt, at most.
        max_new_tokens: tokens of an answer, at most.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        metric: str | None,
        *,
        count: int,
        max_length: int,
        max_new_tokens: int,
    ) -> None:
        self.cases = cases(rows[:count], tokenizer, max_length)
        self.tokenizer, self.metric, self.max_new_tokens = tokenizer, metric, max_new_tokens
        self.own: Metric | None = load_function(metric) if metric is not None and is_own(metric) else None

    def figures(self, model: nn.Module) -> dict[str, float]:
        """Return the figures of the model's answers."""
        answers = answer(model, self.cases, self.tokenizer, self.max_new_tokens)
        return figures(answers, self.cases, self.metric, self.own)


def with_answers(found: Metrics, answering: Answering, model: nn.Module) -> Metrics:
    """Return the metrics of a language model with the figures of its answers."""
    return replace(found, figures={**answering.figures(model), "perplexity": found.perplexity})
