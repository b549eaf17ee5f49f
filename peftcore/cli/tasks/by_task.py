"""How rows of any task become tensors, and what is measured; tasks on judged answers are in `comparisons`."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from peftcore.cli import task_names
from peftcore.cli.data.row import Row
from peftcore.cli.data.token_rows import check_vocabulary
from peftcore.cli.tasks import (
    conversations,
    image_chats,
    images,
    metrics,
    packing,
    positions,
    row_labels,
    sentence_pairs,
    seq2seq,
    speech,
    tags,
)
from peftcore.cli.tasks.conversations import IGNORED
from peftcore.cli.tasks.encoded_examples import Encoded, Example, batches_of, in_dtype, is_encoder_decoder, length
from peftcore.cli.tasks.evaluation_mode import evaluating
from peftcore.cli.tasks.metrics import Metrics
from peftcore.cli.tasks.text_generation import first_token
from peftcore.errors import PeftcoreError
from peftcore.training.loss_without_logits import evaluated_without_logits


def encode(
    rows: Sequence[Row],
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    labels: Sequence[str] = (),
    *,
    may_be_empty: bool = False,
) -> Encoded:
    """Return rows as `input_ids` and `labels`.

    A text longer than `max_length` tokens is split; a prompt with a completion loses the prompt's beginning; texts to
    classify, and conversations, are cut at the end.

    Raises:
        PeftcoreError: a row has no tokens, its label is unknown, or, unless it `may_be_empty`, there is no token to
            learn.
    """
    if max_length < 2:
        raise PeftcoreError(f"the length must be at least 2 tokens, found {max_length}")
    if task == task_names.TAGS:
        return Encoded(*tags.encode(rows, tokenizer, max_length, labels))
    if task == task_names.SEQ2SEQ:
        return Encoded(*seq2seq.encode(rows, tokenizer, max_length))
    if task == task_names.IMAGE:
        return Encoded(images.encode(rows, labels), 0)
    if task == task_names.SPEECH:
        return Encoded(speech.encode(rows, tokenizer, max_length), 0)
    if task == task_names.EMBEDDING:
        return Encoded(*sentence_pairs.encode(rows, tokenizer, max_length))
    if task in (task_names.IMAGE_TEXT, task_names.AUDIO_TEXT):
        return Encoded(*image_chats.encode(rows, tokenizer, max_length))
    if task in task_names.LABELLED:
        return _encode_labelled(rows, tokenizer, max_length, labels)
    parts = []
    for is_chat, some in itertools.groupby(rows, key=lambda row: row.messages is not None):
        parts.append((_encode_conversations if is_chat else _encode_texts)(list(some), tokenizer, max_length))
    examples = [example for part in parts for example in part.examples]
    if not examples and not may_be_empty:
        what = "answer begins" if rows[0].messages is not None else "token to learn is"
        where = "conversation" if rows[0].messages is not None else "row"
        raise PeftcoreError(f"no {what} within {max_length} tokens in any {where}. Increase --max-length")
    return Encoded(examples, sum(part.truncated for part in parts), sum(part.left_out for part in parts))


def _encode_texts(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    examples: list[Example] = []
    truncated = left_out = 0
    for row in rows:
        if row.tokens is not None:
            check_vocabulary(row.where, row.tokens[0], len(tokenizer))
            truncated += len(row.tokens[0]) > max_length
            cut = [list(part[:max_length]) for part in row.tokens]
            left_out += all(label == IGNORED for label in cut[1][1:])
            if any(label != IGNORED for label in cut[1][1:]):
                examples.append(dict(zip(("input_ids", "labels"), cut, strict=True)))
            continue
        ids = tokenizer(row.text)["input_ids"]
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        if row.completion is None:
            ids = ids + end
            truncated += len(ids) > max_length
            pieces = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
            # A single token has nothing to predict.
            parts = [{"input_ids": piece, "labels": list(piece)} for piece in pieces if len(piece) > 1]
        else:
            answer = tokenizer(row.completion, add_special_tokens=False)["input_ids"] + end
            truncated += len(ids) + len(answer) > max_length
            answer = answer[: max_length - 1]
            ids = ids[len(ids) - min(len(ids), max_length - len(answer)) :]
            ids = ids or (answer[:1] and [first_token(tokenizer)])
            parts = [{"input_ids": ids + answer, "labels": [IGNORED] * len(ids) + answer}] if answer else []
        if not parts:
            raise PeftcoreError(f"{row.where}: no tokens to train on after tokenizing")
        examples += parts
    return Encoded(examples, truncated, left_out)


def collator(tokenizer: Any) -> Callable[[list[Example]], dict[str, Any]]:
    """Return a function that makes one padded batch; packed rows are collated by `packing`.

    `input_ids` and `attention_mask` are [batch, length]. `labels` have that shape for a language model; otherwise
    [batch] for classes or numbers, or [batch, labels] of zeros and ones. Images have `pixel_values`, of which
    `tokenizer` is the image processor, or, in conversations, the processor. Recordings have `input_features`.
    """

    def batch(examples: list[Example]) -> dict[str, Any]:
        if "image" in examples[0]:
            return images.collate(examples, tokenizer)
        if "audio" in examples[0]:
            return speech.collate(examples, tokenizer)
        if "texts" in examples[0]:
            return sentence_pairs.collate(examples, tokenizer)
        if "images" in examples[0]:
            return image_chats.collate(examples, tokenizer)
        padding = tokenizer.pad_token_id or 0
        if "position_ids" in examples[0]:
            return packing.collate(examples, padding)
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
        if any("token_type_ids" in example for example in examples):  # which text of a pair a token is of
            segments = [example.get("token_type_ids", [0] * len(example["input_ids"])) for example in examples]
            tensors["token_type_ids"] = torch.tensor([each + [0] * (length - len(each)) for each in segments])
        if isinstance(examples[0]["labels"], list):
            return tensors | {"labels": padded("labels", IGNORED)}
        return tensors | {"labels": torch.tensor([example["labels"] for example in examples])}

    return batch


def measure(
    model: nn.Module,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 16,
    tokens: int | None = None,
    tag_names: Sequence[str] = (),
) -> Metrics:
    """Return the loss over every predicted token or example, independent of batching; no random numbers are drawn.

    Args:
        model: the model.
        examples: what to measure it on.
        tokenizer: the tokenizer.
        batch_size: examples per batch.
        tokens: tokens per batch at most, including padding; None for no limit.
        tag_names: names of the tags, if the labels are those of words.
    """
    batch = collator(tokenizer)
    if "input_ids" in examples[0] and not {"images", "position_ids"} & examples[0].keys():
        positions.check(model, max(map(length, examples)))
    device = next(model.parameters()).device
    is_writer = isinstance(examples[0]["labels"], list) and not tag_names
    first = 0 if is_encoder_decoder(model) else 1  # a causal model has no answer for the first token
    loss, count = 0.0, 0
    answers, labels = [], []
    with evaluating(model), evaluated_without_logits(model) if is_writer else contextlib.nullcontext():
        for some in batches_of(examples, batch_size, tokens):
            inputs = in_dtype({name: t.to(device) for name, t in batch(some).items()}, model)
            output = model(**inputs)
            if tag_names:
                predicted = int((inputs["labels"] != IGNORED).sum())
            else:
                predicted = int((inputs["labels"][:, first:] != IGNORED).sum()) if is_writer else len(inputs["labels"])
            loss += float(output.loss) * predicted
            count += predicted
            if tag_names:
                for chosen, right in zip(output.logits.argmax(-1).cpu(), inputs["labels"].cpu(), strict=True):
                    answers.append(chosen[right != IGNORED])
                    labels.append(right[right != IGNORED])
            elif not is_writer:
                answers.append(output.logits.float().cpu())
                labels.append(inputs["labels"].cpu())
    if is_writer:
        return Metrics(loss / count, count)
    found = tags.figures(answers, labels, tag_names) if tag_names else _figures(torch.cat(answers), torch.cat(labels))
    return replace(found, loss=loss / count)


def _figures(answers: Tensor, labels: Tensor) -> Metrics:
    """Return the figures of logits by labels: classes [n], zeros and ones [n, outputs], or numbers [n]."""
    if labels.dim() == 2:
        return metrics.of_label_sets(answers > 0, labels)
    if labels.is_floating_point():
        return metrics.of_numbers(answers[:, 0], labels)
    return metrics.of_classes(answers.argmax(-1), labels, answers.shape[1])


@torch.no_grad()
def classify(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    labels: Sequence[str],
    max_length: int,
    task: str,
    pair: str | None = None,
) -> str:
    """Return the most likely label of `text` (and `pair`) with its probability, all above one half, or a number.

    Raises:
        PeftcoreError: the text has no tokens, or more than the model has positions for.
    """
    texts = (text,) if pair is None else (text, pair)
    inputs = tokenizer(*texts, return_tensors="pt", truncation=True, max_length=max_length)
    if not inputs["input_ids"].shape[1]:
        raise PeftcoreError("the text has no tokens. Pass another one")
    positions.check(model, inputs["input_ids"].shape[1], "Pass a shorter text")
    names = ("input_ids", "attention_mask", *(["token_type_ids"] if pair is not None else []))
    inputs = {name: inputs[name].to(next(model.parameters()).device) for name in names if name in inputs}
    logits = model(**inputs).logits[0].float()
    if task == task_names.REGRESSION:
        return f"{logits.item():.4g}"
    if task == task_names.MULTI_LABEL:
        chances = zip(labels, logits.sigmoid().tolist(), strict=True)
        return ", ".join(f"{label} ({100 * chance:.1f} %)" for label, chance in chances if chance > 0.5) or "none"
    probabilities = logits.softmax(-1)
    best = int(probabilities.argmax())
    return f"{labels[best]} ({100 * probabilities[best]:.1f} %)"


def _encode_labelled(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, labels: Sequence[str]
) -> Encoded:
    targets = row_labels.targets(list(rows), list(labels))
    examples, truncated = [], 0
    labelled = zip(rows, targets, strict=True)
    for has_pair, group in itertools.groupby(labelled, key=lambda each: each[0].pair is not None):
        some = list(group)
        texts = [[row.text for row, _ in some], *([[row.pair or "" for row, _ in some]] if has_pair else [])]
        whole, cut = tokenizer(*texts), tokenizer(*texts, truncation=True, max_length=max_length)
        truncated += sum(len(tokens) > max_length for tokens in whole["input_ids"])
        names = [name for name in ("input_ids", *(["token_type_ids"] if has_pair else [])) if name in cut]
        for (row, label), *values in zip(some, *(cut[name] for name in names), strict=True):
            if not values[0]:
                raise PeftcoreError(f"{row.where}: the text has no tokens")
            examples.append({**dict(zip(names, values, strict=True)), "labels": label})
    return Encoded(examples, truncated)


def _encode_conversations(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    examples, truncated, left_out = [], 0, 0
    for row in rows:
        for example in conversations.encode(row, tokenizer):
            truncated += len(example["input_ids"]) > max_length
            cut = {name: values[:max_length] for name, values in example.items()}
            if any(label != IGNORED for label in cut["labels"][1:]):
                examples.append(cut)
            else:
                left_out += 1
    return Encoded(examples, truncated, left_out)
