"""Base class of tasks on preference pairs: prompts with a chosen and a rejected answer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from peftcore.errors import PeftcoreError
from peftcore_cli.data import image_turns, turns
from peftcore_cli.data.labels import text_of
from peftcore_cli.data.row import Row
from peftcore_cli.tasks import conversations, text_examples
from peftcore_cli.tasks.conversations import IGNORE_INDEX
from peftcore_cli.tasks.encoded_examples import Encoded, Example
from peftcore_cli.tasks.judged import Judged


class Preferences(Judged):
    """A prompt with a chosen and a rejected answer."""

    keys = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
    shown_keys = "prompt/chosen/rejected"
    columns_example = "chosen=better,rejected=worse"

    def read_row(self, location: str, fields: dict[str, Any], keys: tuple[str, ...]) -> Row:
        """Return a prompt with a chosen and a rejected answer.

        Raises:
            PeftcoreError: an answer is empty, or both answers are equal. The message begins with `location`.
        """
        if image_turns.has_images(fields):
            raise PeftcoreError(f"{location}: --task {self.name} does not support images. Use --task image-dpo")
        row = (
            _compared_turns(location, fields)
            if isinstance(fields["chosen"], list)
            else _compared_texts(location, fields)
        )
        if row.completion == row.rejected:
            raise PeftcoreError(f"{location}: 'chosen' and 'rejected' are the same answer. Remove the row")
        return row

    def encode(
        self,
        rows: Sequence[Row],
        processor: Any,
        max_length: int,
        labels: Sequence[str] = (),
        *,
        may_be_empty: bool = False,
    ) -> Encoded:
        """Encode rows as `prompt_ids`, `chosen_ids` and `rejected_ids`. Long prompts are truncated at the beginning.

        Raises:
            PeftcoreError: a row has no tokens, the two answers of a row have the same tokens, or no row has answers
                that differ within `max_length` tokens.
        """
        examples, truncated_count, left_out = [], 0, 0
        for row in rows:
            chosen_example, rejected_example = (
                with_answer(row, answer, processor) for answer in (row.completion, row.rejected)
            )
            begin = min(first_learned_index(chosen_example), first_learned_index(rejected_example))
            ids, rejected_ids = chosen_example["input_ids"], rejected_example["input_ids"]
            # Tokens may merge across the end of the prompt, so the token sequences can differ before the answers start.
            prompt = next((i for i in range(begin) if ids[i] != rejected_ids[i]), begin)
            pair = (learned_tokens(chosen_example, prompt), learned_tokens(rejected_example, prompt))
            if pair[0] == pair[1]:
                raise PeftcoreError(
                    f"{row.location}: 'chosen' and 'rejected' have the same tokens, so neither can be preferred. "
                    "Remove the row, or use a model whose tokenizer distinguishes them"
                )
            truncated_count += prompt + max(map(len, pair)) > max_length
            pair = (pair[0][: max_length - 1], pair[1][: max_length - 1])
            if pair[0] == pair[1]:
                left_out += 1
                continue
            room = min(prompt, max_length - max(map(len, pair)))
            prompt_ids = ids[prompt - room : prompt]
            if not prompt_ids:
                raise PeftcoreError(f"{row.location}: the prompt has no tokens. Remove the row")
            examples.append({"prompt_ids": prompt_ids, "chosen_ids": pair[0], "rejected_ids": pair[1]})
        if not examples and not may_be_empty:
            raise PeftcoreError(f"no two answers differ within {max_length} tokens. Increase --max-length")
        return Encoded(examples, truncated_count, left_out)

    def as_texts(self, examples: Sequence[Example]) -> list[Example]:
        """Return the chosen answers as examples of a language model, for methods that initialise from data."""
        return [join_answer(example, "chosen_ids") for example in examples]

    def lengths(self, examples: Sequence[Example]) -> list[int]:
        """Return the number of tokens of the prompt with the longer answer."""
        return [len(e["prompt_ids"]) + max(len(e["chosen_ids"]), len(e["rejected_ids"])) for e in examples]


def _compared_texts(location: str, fields: dict[str, Any]) -> Row:
    prompt, chosen_text, rejected_text = (
        text_of(location, key, fields.get(key)) for key in ("prompt", "chosen", "rejected")
    )
    for key, answer in (("chosen", chosen_text), ("rejected", rejected_text)):
        if not answer.strip():
            raise PeftcoreError(f"{location}: '{key}' is empty. Remove the row, or add an answer")
    return Row(location, prompt, completion=chosen_text, rejected=rejected_text)


def _compared_turns(location: str, fields: dict[str, Any]) -> Row:
    answers = {key: turns.messages_of(location, key, fields[key]) for key in ("chosen", "rejected")}
    if fields.get("prompt") is not None:
        prompt = turns.messages_of(location, "prompt", fields["prompt"])
    else:  # both contain the whole conversation
        pairs = zip(answers["chosen"], answers["rejected"], strict=False)
        prompt = [turn for turn, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
        answers = {key: messages[len(prompt) :] for key, messages in answers.items()}
        if not prompt:
            raise PeftcoreError(
                f"{location}: 'chosen' and 'rejected' begin with different prompts. Use the same prompt for both"
            )
    for key, answer in answers.items():
        if [message["role"] for message in answer] != ["assistant"]:
            roles = ", ".join(message["role"] for message in answer) or "nothing"
            raise PeftcoreError(f"{location}: '{key}' must be a single assistant answer to the prompt, found {roles}")
    answers = {key: turns.without_marks(answer) for key, answer in answers.items()}
    row = turns.conversation(location, [*prompt, *answers["chosen"]], len(prompt), fields)
    return Row(
        location, "", answers["chosen"], answers["rejected"], messages=turns.without_marks(prompt), tools=row.tools
    )


def log_likelihoods(model: nn.Module, examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the log-likelihood of the learned tokens of each example, [examples], in float32."""
    batch = text_examples.collate(examples, tokenizer.pad_token_id or 0)
    device = next(model.parameters()).device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask", "labels")}
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    targets = inputs["labels"][:, 1:]
    # One row at a time: a training step does not copy logits, and evaluation must not need more memory than training.
    rows = zip(logits, targets, strict=True)
    return -torch.stack(
        [F.cross_entropy(x.float(), y, ignore_index=IGNORE_INDEX, reduction="sum") for x, y in rows]
    ).cpu()


def with_answer(row: Row, answer: Any, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Encode the prompt with one of its answers as an example of a language model."""
    if row.messages is not None:
        begins = len(row.messages)
        answered_row = Row(row.location, "", messages=[*row.messages, *answer], learned_from=begins, tools=row.tools)
        (example,) = conversations.encode(answered_row, tokenizer)
        return example
    answered_row = Row(row.location, row.text, completion=answer)
    return text_examples.encode([answered_row], tokenizer, 1 << 30).examples[0]


def first_learned_index(example: Example) -> int:
    return next(i for i, label in enumerate(example["labels"]) if label != IGNORE_INDEX)


def learned_tokens(example: Example, begin: int) -> list[int]:
    """Return the tokens from `begin` to the last learned token, without the template's text after the answer."""
    end = max(i for i, label in enumerate(example["labels"]) if label != IGNORE_INDEX)
    return list(example["input_ids"][begin : end + 1])


def join_answer(example: Example, answer: str) -> Example:
    prompt, ids = example["prompt_ids"], example[answer]
    return {"input_ids": prompt + ids, "labels": [IGNORE_INDEX] * len(prompt) + ids}
