"""What tasks on preference pairs have in common: which of two answers to a prompt is better."""

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
from peftcore_cli.tasks.conversations import IGNORED
from peftcore_cli.tasks.encoded_examples import Encoded, Example
from peftcore_cli.tasks.judged import Judged


class Preferences(Judged):
    """A prompt with a chosen and a rejected answer."""

    keys = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
    shown_keys = "prompt/chosen/rejected"
    columns_example = "chosen=better,rejected=worse"

    def read_row(self, where: str, fields: dict[str, Any], keys: tuple[str, ...]) -> Row:
        """Return a prompt with a chosen and a rejected answer.

        Raises:
            PeftcoreError: an answer is empty or both are equal; the message begins with `where`.
        """
        if image_turns.has_images(fields):
            raise PeftcoreError(
                f"{where}: the row has images, which --task {self.name} does not read. Use --task image-dpo"
            )
        row = _compared_turns(where, fields) if isinstance(fields["chosen"], list) else _compared_texts(where, fields)
        if row.completion == row.rejected:
            raise PeftcoreError(f"{where}: 'chosen' and 'rejected' are the same")
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
        """Return rows as `prompt_ids`, `chosen_ids` and `rejected_ids`; long prompts are cut at the beginning.

        Raises:
            PeftcoreError: a row has no tokens, or both answers have the same tokens; or in every row they begin to
                differ beyond `max_length`, where they are cut.
        """
        examples, truncated, left_out = [], 0, 0
        for row in rows:
            chosen, rejected = (answered(row, answer, processor) for answer in (row.completion, row.rejected))
            begin = min(first_learned(chosen), first_learned(rejected))
            ids, others = chosen["input_ids"], rejected["input_ids"]
            prompt = next(
                (i for i in range(begin) if ids[i] != others[i]), begin
            )  # tokens may merge across the boundary
            pair = (learned(chosen, prompt), learned(rejected, prompt))
            if pair[0] == pair[1]:
                raise PeftcoreError(
                    f"{row.where}: 'chosen' and 'rejected' have the same tokens, so none can be preferred. Remove the "
                    "row, or use a model whose tokenizer knows their words"
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

    def as_texts(self, examples: Sequence[Example]) -> list[Example]:
        """Return the chosen answers as examples of a language model, for methods that initialise from data."""
        return [joined(each, "chosen_ids") for each in examples]

    def lengths(self, examples: Sequence[Example]) -> list[int]:
        """Return the number of tokens of the prompt with the longer answer."""
        return [len(e["prompt_ids"]) + max(len(e["chosen_ids"]), len(e["rejected_ids"])) for e in examples]


def _compared_texts(where: str, fields: dict[str, Any]) -> Row:
    prompt, chosen, rejected = (text_of(where, key, fields.get(key)) for key in ("prompt", "chosen", "rejected"))
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer.strip():
            raise PeftcoreError(f"{where}: '{key}' is empty")
    return Row(where, prompt, completion=chosen, rejected=rejected)


def _compared_turns(where: str, fields: dict[str, Any]) -> Row:
    answers = {key: turns.messages_of(where, key, fields[key]) for key in ("chosen", "rejected")}
    if fields.get("prompt") is not None:
        asked = turns.messages_of(where, "prompt", fields["prompt"])
    else:  # both contain the whole conversation
        pairs = zip(answers["chosen"], answers["rejected"], strict=False)
        asked = [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
        answers = {key: messages[len(asked) :] for key, messages in answers.items()}
        if not asked:
            raise PeftcoreError(f"{where}: 'chosen' and 'rejected' must begin with the same prompt")
    for key, answer in answers.items():
        if [message["role"] for message in answer] != ["assistant"]:
            found = ", ".join(message["role"] for message in answer) or "nothing"
            raise PeftcoreError(f"{where}: '{key}' must be one assistant answer to the same prompt, found {found}")
    answers = {key: turns.without_marks(answer) for key, answer in answers.items()}
    whole = turns.conversation(where, [*asked, *answers["chosen"]], len(asked), fields)
    return Row(
        where, "", answers["chosen"], answers["rejected"], messages=turns.without_marks(asked), tools=whole.tools
    )


def log_likelihoods(model: nn.Module, examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return log p of the learned tokens of each example, [examples], in float32."""
    batch = text_examples.collate(examples, tokenizer.pad_token_id or 0)
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
    return text_examples.encode([asked], tokenizer, 1 << 30).examples[0]


def first_learned(example: Example) -> int:
    return next(i for i, label in enumerate(example["labels"]) if label != IGNORED)


def learned(example: Example, begin: int) -> list[int]:
    """Return the tokens from `begin` to the last learned one, without what a template writes after the answer."""
    end = max(i for i, label in enumerate(example["labels"]) if label != IGNORED)
    return list(example["input_ids"][begin : end + 1])


def joined(example: Example, answer: str) -> Example:
    prompt, ids = example["prompt_ids"], example[answer]
    return {"input_ids": prompt + ids, "labels": [IGNORED] * len(prompt) + ids}
