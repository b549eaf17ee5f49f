"""Generate answers to held-out examples, and score them by exact match, ROUGE-L or a function of the user.

Answers are generated greedily. Prompts of the same length form a batch, so no padding is needed.

ROUGE-L (Lin 2004) is the F1 of the longest common subsequence of words, averaged over examples. Words are runs of
letters and digits in lower case.
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
from peftcore_cli.tasks.text_generation import end_tokens

if TYPE_CHECKING:
    from peftcore_cli.tasks.task import Task

FIGURES = ("exact_match", "rouge_l")
DEFAULT_COUNT = 100  # answers per evaluation

Metric = Callable[[list[str], list[str]], float]
Reward = Callable[..., list[float | None]]


@dataclass(frozen=True)
class Case:
    """A prompt as token ids, with the expected answer."""

    ids: list[int]
    expected: str


def is_user_function(metric: str | None) -> bool:
    """Return whether `metric` is FILE.py:FUNCTION."""
    return metric is not None and ".py:" in metric


def name_of(metric: str) -> str:
    """Return the name of a metric in reports; FILE.py:FUNCTION becomes FUNCTION."""
    return metric.rpartition(":")[2] if is_user_function(metric) else metric


def answer_count(task: Task, metric: str | None, count: int | None) -> int:
    """Return the number of held-out examples to answer in each evaluation, given --metric and --eval-answers.

    Raises:
        PeftcoreError: models of this task generate no answers.
    """
    if not task.writes:
        if count is not None or is_user_function(metric):
            raise PeftcoreError(
                f"--eval-answers and --metric FILE.py:FUNCTION only work with {registered.names_with('writes')} (the "
                f"task is {task.name}). Remove these options"
            )
        return 0
    if count is not None:
        return count
    needs_answers = is_user_function(metric) or metric in FIGURES
    return DEFAULT_COUNT if needs_answers else 0


def load_function(text: str, option: str = "--metric") -> Callable[..., Any]:
    """Run a file and return its function, for FILE.py:FUNCTION.

    Raises:
        PeftcoreError: the file fails, or has no such function.
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
        raise PeftcoreError(
            f"{option} {text}: importing '{path}' fails with {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise PeftcoreError(f"{option} {text}: '{path}' has no function '{name}'. Pass FILE.py:FUNCTION")
    return function


def load_reward(text: str) -> Reward:
    """Return the reward function FILE.py:FUNCTION, wrapped to check its results.

    Raises:
        PeftcoreError: the file or the function does not exist.
    """
    if not is_user_function(text):
        raise PeftcoreError(f"--reward must be FILE.py:FUNCTION, found '{text}'")
    function = load_function(text, "--reward")

    @functools.wraps(function)
    def checked(**columns: Any) -> list[float | None]:
        try:
            rewards = function(**columns)
        except Exception as error:
            raise PeftcoreError(
                f"--reward {text} fails with {type(error).__name__}: {error}. The function is called with prompts, "
                "completions, completion_ids and the columns of the rows as keyword arguments, so accept **kwargs"
            ) from error
        count = len(columns["completions"])
        values = list(rewards) if isinstance(rewards, (list, tuple)) else []
        if len(values) != count or not all(map(_is_reward, values)):
            raise PeftcoreError(
                f"--reward {text} must return a list of {count} finite numbers or None, one per answer, found "
                f"{str(rewards)[:80]}"
            )
        return [None if value is None else float(value) for value in values]

    return checked


def _is_reward(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and math.isfinite(value))


def cases(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Case]:
    """Return the prompts and expected answers of rows. The answer of a conversation is its last learned turn.

    Raises:
        PeftcoreError: a row has no prompt, or its prompt is longer than `max_length` tokens.
    """
    prompts = []
    for row in rows:
        if row.messages is not None:
            turns = [i for i, m in enumerate(row.messages) if m["role"] == "assistant" and i not in row.not_learned]
            prompt = conversations.render(tokenizer, row.messages[: turns[-1]], row.tools, begins_answer=True)
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            expected = str(row.messages[turns[-1]].get("content") or "")
        elif isinstance(row.completion, str):
            ids, expected = tokenizer(row.text)["input_ids"], row.completion
        else:
            raise PeftcoreError(
                f"{row.location}: the row has {row.kind}, which has no prompt to answer. Metrics of answers need "
                "prompt/completion, messages or source/target. Remove --eval-answers, or pass --metric loss"
            )
        if not 0 < len(ids) <= max_length:
            raise PeftcoreError(
                f"{row.location}: the prompt must have 1 to {max_length:,} tokens (--max-length), found {len(ids):,}. "
                "Increase --max-length, or remove the example"
            )
        prompts.append(Case(list(ids), expected))
    return prompts


def answer(
    model: Any, cases: Sequence[Case], tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, batch_size: int = 8
) -> list[str]:
    """Return the model's answers in the order of the cases, without drawing random numbers."""
    device = next(model.parameters()).device
    by_length: dict[int, list[int]] = {}
    for i, case in enumerate(cases):
        by_length.setdefault(len(case.ids), []).append(i)
    answers_in_order = [""] * len(cases)
    with evaluating(model), positions.generation_within(model, "--answer-tokens"):
        for size, places in sorted(by_length.items()):
            for batch in batched(places, batch_size):
                ids = torch.tensor([cases[i].ids for i in batch], device=device)
                tokens = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=end_tokens(model, tokenizer),
                )
                answer_tokens = tokens if model.config.is_encoder_decoder else tokens[:, size:]
                for i, text in zip(batch, tokenizer.batch_decode(answer_tokens, skip_special_tokens=True), strict=True):
                    answers_in_order[i] = text
    return answers_in_order


def figures(
    answers: Sequence[str], cases: Sequence[Case], metric: str | None, user_metric: Metric | None
) -> dict[str, float]:
    """Return the metrics of answers: exact match, ROUGE-L and the user's metric.

    Raises:
        PeftcoreError: the user's function fails, or returns something other than a finite number.
    """
    expected = [case.expected for case in cases]
    values: dict[str, float] = {}
    if user_metric is not None and metric is not None:
        values[name_of(metric)] = _of_user(metric, user_metric, list(answers), expected)
    pairs = list(zip(answers, expected, strict=True))
    values["exact_match"] = sum(answer.strip() == reference.strip() for answer, reference in pairs) / len(pairs)
    values["rouge_l"] = sum(rouge_l(answer, reference) for answer, reference in pairs) / len(pairs)
    return values


def _of_user(metric: str, function: Metric, answers: list[str], expected: list[str]) -> float:
    try:
        value = function(answers, expected)
    except Exception as error:
        raise PeftcoreError(
            f"--metric {metric} fails with {type(error).__name__}: {error}. The function is called with two lists of "
            "texts: the answers and the expected texts"
        ) from error
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise PeftcoreError(f"--metric {metric} must return a finite number, where higher is better, found {value!r}")
    return float(value)


def rouge_l(answer: str, expected: str) -> float:
    """Return the ROUGE-L F1 of two texts, or 1 if neither has words."""
    words, reference = (re.findall(r"[^\W_]+", text.lower()) for text in (answer, expected))
    if not words or not reference:
        return float(words == reference)
    previous = [0] * (len(reference) + 1)
    for word in words:
        row = [0]
        for j, reference_word in enumerate(reference):
            row.append(previous[j] + 1 if word == reference_word else max(previous[j + 1], row[j]))
        previous = row
    return 2 * previous[-1] / (len(words) + len(reference))


class Answering:
    """Answers held-out examples and computes the metrics of the answers.

    Args:
        rows: held-out examples; the first `count` are answered.
        tokenizer: the tokenizer.
        metric: value of `--metric`.
        count: number of examples to answer.
        max_length: maximum number of tokens of a prompt.
        max_new_tokens: maximum number of tokens of an answer.
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
        self.user_metric: Metric | None = (
            load_function(metric) if metric is not None and is_user_function(metric) else None
        )

    def figures(self, model: nn.Module) -> dict[str, float]:
        """Return the metrics of the model's answers."""
        answers = answer(model, self.cases, self.tokenizer, self.max_new_tokens)
        return figures(answers, self.cases, self.metric, self.user_metric)


def with_answers(metrics: Metrics, answering: Answering, model: nn.Module) -> Metrics:
    """Return the metrics of a language model with the metrics of its answers."""
    return replace(metrics, figures={**answering.figures(model), "perplexity": metrics.perplexity})
