"""Encode texts and conversations as token ids with labels, collate them, and compute their loss."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from peftcore.errors import PeftcoreError
from peftcore.training import evaluated_without_logits
from peftcore_cli.data.row import Row
from peftcore_cli.data.token_rows import check_vocabulary
from peftcore_cli.tasks import conversations, packing, positions
from peftcore_cli.tasks.conversations import IGNORE_INDEX
from peftcore_cli.tasks.encoded_examples import Encoded, Example, batches_of, in_dtype, is_encoder_decoder
from peftcore_cli.tasks.evaluation_mode import evaluating
from peftcore_cli.tasks.metrics import Metrics
from peftcore_cli.tasks.text_generation import first_token

if TYPE_CHECKING:
    from peftcore_cli.tasks.task import Evaluation, Task


def encode(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, *, may_be_empty: bool = False
) -> Encoded:
    """Encode rows as `input_ids` and `labels`.

    A text longer than `max_length` tokens is split, a prompt is truncated at its beginning, and a conversation at its
    end.

    Raises:
        PeftcoreError: a row has no tokens, or no token is left to learn and `may_be_empty` is False.
    """
    parts = []
    for is_chat, group in itertools.groupby(rows, key=lambda row: row.messages is not None):
        encode_group = _encode_conversations if is_chat else _encode_texts
        parts.append(encode_group(list(group), tokenizer, max_length))
    examples = [example for part in parts for example in part.examples]
    if not examples and not may_be_empty:
        subject = "an answer" if rows[0].messages is not None else "a token to learn"
        unit = "conversation" if rows[0].messages is not None else "row"
        raise PeftcoreError(f"no {unit} has {subject} within {max_length} tokens. Increase --max-length")
    return Encoded(examples, sum(part.truncated for part in parts), sum(part.left_out for part in parts))


def _encode_texts(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    examples: list[Example] = []
    truncated_count = left_out = 0
    for row in rows:
        if row.tokens is not None:
            check_vocabulary(row.location, row.tokens[0], len(tokenizer))
            truncated_count += len(row.tokens[0]) > max_length
            columns = [list(part[:max_length]) for part in row.tokens]
            left_out += all(label == IGNORE_INDEX for label in columns[1][1:])
            if any(label != IGNORE_INDEX for label in columns[1][1:]):
                examples.append(dict(zip(("input_ids", "labels"), columns, strict=True)))
            continue
        ids = tokenizer(row.text)["input_ids"]
        end_token = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        if row.completion is None:
            ids = ids + end_token
            truncated_count += len(ids) > max_length
            pieces = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
            # A single token has nothing to predict.
            parts = [{"input_ids": piece, "labels": list(piece)} for piece in pieces if len(piece) > 1]
        else:
            answer = tokenizer(row.completion, add_special_tokens=False)["input_ids"] + end_token
            truncated_count += len(ids) + len(answer) > max_length
            answer = answer[: max_length - 1]
            ids = ids[len(ids) - min(len(ids), max_length - len(answer)) :]
            ids = ids or (answer[:1] and [first_token(tokenizer)])
            parts = [{"input_ids": ids + answer, "labels": [IGNORE_INDEX] * len(ids) + answer}] if answer else []
        if not parts:
            raise PeftcoreError(
                f"{row.location}: tokenizing leaves no token to learn. Remove the row, or use another model"
            )
        examples += parts
    return Encoded(examples, truncated_count, left_out)


def _encode_conversations(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    examples, truncated_count, left_out = [], 0, 0
    for row in rows:
        for example in conversations.encode(row, tokenizer):
            truncated_count += len(example["input_ids"]) > max_length
            truncated_example = {name: values[:max_length] for name, values in example.items()}
            if any(label != IGNORE_INDEX for label in truncated_example["labels"][1:]):
                examples.append(truncated_example)
            else:
                left_out += 1
    return Encoded(examples, truncated_count, left_out)


def collate(examples: Sequence[Example], padding: int) -> dict[str, Any]:
    """Return a padded batch. Packed rows are collated by `packing`.

    `input_ids` and `attention_mask` are [batch, length]. `labels` are [batch, length] if each token has one, [batch]
    for classes or numbers, or [batch, labels] of zeros and ones.
    """
    if "position_ids" in examples[0]:
        return packing.collate(list(examples), padding)
    length = max(len(example["input_ids"]) for example in examples)

    def padded(key: str, value: int) -> Tensor:
        length = max(len(example[key]) for example in examples)
        return torch.tensor([e[key] + [value] * (length - len(e[key])) for e in examples])

    tensors = {
        "input_ids": padded("input_ids", padding),
        "attention_mask": torch.tensor(
            [[1] * len(e["input_ids"]) + [0] * (length - len(e["input_ids"])) for e in examples]
        ),
    }
    if any("token_type_ids" in example for example in examples):  # marks the second text of a pair
        segments = [example.get("token_type_ids", [0] * len(example["input_ids"])) for example in examples]
        tensors["token_type_ids"] = torch.tensor([segment + [0] * (length - len(segment)) for segment in segments])
    if isinstance(examples[0]["labels"], list):
        return tensors | {"labels": padded("labels", IGNORE_INDEX)}
    return tensors | {"labels": torch.tensor([example["labels"] for example in examples])}


def outputs(
    model: nn.Module, examples: Sequence[Example], task: Task, evaluation: Evaluation
) -> Iterator[tuple[Tensor, Any]]:
    """Yield (labels, output of the model) for batches of similar lengths.

    With `evaluation.longest`, a batch has at most as many tokens, including padding, as a training batch.

    Raises:
        PeftcoreError: a text has more tokens than the model has positions.
    """
    if task.has_positions and "position_ids" not in examples[0]:
        positions.check(model, max(task.lengths(examples)))
    device = next(model.parameters()).device
    size, budget = evaluation.batch_size, None
    if evaluation.longest is not None:
        size, budget = 16, evaluation.batch_size * evaluation.longest
    with evaluating(model):
        for batch_examples in batches_of(examples, size, budget):
            batch = {
                name: value.to(device) for name, value in task.collate(batch_examples, evaluation.processor).items()
            }
            inputs = in_dtype(batch, model)
            yield inputs["labels"], model(**inputs)


def measure(model: nn.Module, examples: Sequence[Example], task: Task, evaluation: Evaluation) -> Metrics:
    """Return the mean loss over all predicted tokens, independent of batching and without drawing random numbers."""
    begin = 0 if is_encoder_decoder(model) else 1  # causal models do not predict the first token
    loss, count = 0.0, 0
    with evaluated_without_logits(model):
        for labels, output in outputs(model, examples, task, evaluation):
            tokens = int((labels[:, begin:] != IGNORE_INDEX).sum())
            loss, count = loss + float(output.loss) * tokens, count + tokens
    return Metrics(loss / count, count)
