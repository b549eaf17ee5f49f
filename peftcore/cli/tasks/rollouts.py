"""Answers that the model samples and a function of the user's judges (`--task grpo --reward FILE.py:FUNCTION`).

Shao et al. 2024, arXiv 2402.03300, by TRL's GRPOTrainer, whose convention for functions is used: they are called with
`prompts`, `completions`, `completion_ids` and each further column of the rows by name, and return a number for each
answer. Held-out prompts are answered greedily; the loss that is reported is the negative mean reward.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from peftcore.cli.data.row import Row
from peftcore.cli.tasks import conversations, generations
from peftcore.cli.tasks.encoded_examples import Encoded, Example
from peftcore.cli.tasks.metrics import Metrics
from peftcore.errors import PeftcoreError

HAS_REFERENCE = False
_IDS = "prompt_ids"  # not a column that functions see

Reward = Callable[..., list[float | None]]


def load_reward(text: str) -> Reward:
    """Return the function FILE.py:FUNCTION, whose results are checked when it is called.

    Raises:
        PeftcoreError: the file or the function does not exist.
    """
    if not generations.is_own(text):
        raise PeftcoreError(f"--reward must be FILE.py:FUNCTION, found '{text}'")
    function = generations.load_function(text, "--reward")

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


def encode(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Return rows as `prompt`, `prompt_ids` and their other columns.

    Raises:
        PeftcoreError: a prompt is empty or longer than `max_length` tokens.
    """
    examples = []
    for row in rows:
        if row.messages is None:
            prompt: Any = row.text
            ids = tokenizer(prompt)["input_ids"]
        else:
            prompt = row.messages
            ids = tokenizer(conversations.rendered(tokenizer, prompt, begins_answer=True), add_special_tokens=False)[
                "input_ids"
            ]
        if not 0 < len(ids) <= max_length:
            raise PeftcoreError(
                f"{row.where}: a prompt must have 1 to {max_length:,} tokens (--max-length), found {len(ids):,}"
            )
        examples.append({**row.columns, "prompt": prompt, _IDS: list(ids)})
    return Encoded(examples, 0)


def as_texts(examples: Sequence[Example]) -> list[Example]:
    """Return the prompts as examples of a language model, for methods that initialise from data."""
    return [{"input_ids": each[_IDS], "labels": list(each[_IDS])} for each in examples]


def lengths(examples: Sequence[Example]) -> list[int]:
    """Return the number of tokens of each prompt."""
    return [len(each[_IDS]) for each in examples]


def columns(examples: Sequence[Example]) -> list[Example]:
    """Return examples with the columns of TRL's GRPOTrainer."""
    return [{name: value for name, value in each.items() if name != _IDS} for each in examples]


def measure(
    model: nn.Module,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    reward: Reward,
    max_new_tokens: int,
) -> Metrics:
    """Return the mean reward of greedy answers; the loss is its negative.

    Raises:
        PeftcoreError: no answer has a reward.
    """
    cases = [generations.Case(each[_IDS], "") for each in examples]
    texts = generations.answer(model, cases, tokenizer, max_new_tokens)
    answers: list[Any] = [
        text if isinstance(each["prompt"], str) else [{"role": "assistant", "content": text}]
        for text, each in zip(texts, examples, strict=True)
    ]
    rows = columns(examples)
    others = {name: [row.get(name) for row in rows] for name in rows[0] if name != "prompt"}
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    found = reward(prompts=[row["prompt"] for row in rows], completions=answers, completion_ids=ids, **others)
    values = [value for value in found if value is not None]
    if not values:
        raise PeftcoreError("--reward returns None for every held-out answer. Return a number for some of them")
    mean = sum(values) / len(values)
    return Metrics(-mean, len(values), {"reward": mean})
