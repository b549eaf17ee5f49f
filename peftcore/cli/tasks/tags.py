"""A tag for each word (`--task tags`): named entities, parts of speech.

A word's tag is learned, predicted and measured at its first token. If tags are `B-X` and `I-X`, also with `E-X` (the
last word of an entity) and `S-X` (an entity of one word), entities are counted as by conlleval (Tjong Kim Sang and
Buchholz 2000) and seqeval: one is right if its type, beginning and end are; `I-X` after another type or `O` begins one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from peftcore.cli.data.row import Row, naming
from peftcore.cli.tasks import metrics, positions
from peftcore.cli.tasks.conversations import IGNORED
from peftcore.cli.tasks.metrics import Metrics
from peftcore.errors import PeftcoreError, nearest

_MARKS = ("B-", "I-", "E-", "S-")


def encode(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, labels: Sequence[str]
) -> tuple[list[dict[str, Any]], int]:
    """Return (rows as `input_ids` and `labels`, number of truncated rows).

    Words beyond `max_length` tokens are cut off.

    Raises:
        PeftcoreError: a tag is unknown, or the tokenizer cannot say which word a token is of.
    """
    index = {label: i for i, label in enumerate(labels)}
    examples, truncated = [], 0
    for row in rows:
        tags = row.label if isinstance(row.label, tuple) else ()
        unknown = next((tag for tag in tags if tag not in index), None)
        if unknown is not None:
            raise PeftcoreError(
                f"{row.where}: tag '{unknown}' is unknown{nearest(unknown, labels)}. The model knows: "
                f"{', '.join(labels)}"
            )
        with naming(row.where):
            ids, firsts = tokens_of(row.words, tokenizer, max_length)
        truncated += len(firsts) < len(row.words)
        targets = [IGNORED] * len(ids)
        for place, tag in zip(firsts, tags, strict=False):
            targets[place] = index[tag]
        if not firsts:
            raise PeftcoreError(f"{row.where}: no word has a token within --max-length {max_length}")
        examples.append({"input_ids": ids, "labels": targets})
    return examples, truncated


def tokens_of(words: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[list[int], list[int]]:
    """Return (tokens, index of the first token of each word) of as many words as fit.

    Raises:
        PeftcoreError: the tokenizer has no offsets, or has no token for a word.
    """
    if not tokenizer.is_fast:
        raise PeftcoreError(
            f"--task tags needs a fast tokenizer, which knows where a token is in the text, found "
            f"{type(tokenizer).__name__}. Use a model with a tokenizer.json"
        )
    text = " ".join(words)
    encoded = tokenizer(text, truncation=True, max_length=max_length, return_offsets_mapping=True)
    first: dict[int, int] = {}  # token of each beginning of a word
    for i, (begin, end) in enumerate(encoded["offset_mapping"]):
        begin += len(text[begin:end]) - len(text[begin:end].lstrip())
        if begin < end:
            first.setdefault(begin, i)
    reach = max((end for _, end in encoded["offset_mapping"]), default=0)
    firsts, begin = [], 0
    for word in words:
        if begin >= reach:
            break
        if begin not in first:
            raise PeftcoreError(
                f"the tokenizer has no token that begins with the word '{word}'. Join it to the one before"
            )
        firsts.append(first[begin])
        begin += len(word) + 1
    return list(encoded["input_ids"]), firsts


def figures(answers: Sequence[Tensor], wanted: Sequence[Tensor], names: Sequence[str]) -> Metrics:
    """Return accuracy and macro F1 of words, and F1 of entities if there are any; the loss is zero.

    Args:
        answers: predicted tags of each sentence's words.
        wanted: their tags.
        names: names of the tags.
    """
    found = metrics.of_classes(torch.cat(list(answers)), torch.cat(list(wanted)), len(names))
    if not any(name.startswith(("B-", "I-")) for name in names):
        return found
    return replace(found, figures={**found.figures, "entity_f1": entity_f1(answers, wanted, names)})


def entity_f1(answers: Sequence[Tensor], wanted: Sequence[Tensor], names: Sequence[str]) -> float:
    """Return the F1 of entities over all sentences, given the tags' indices in each."""
    right = count = 0
    for each, other in zip(answers, wanted, strict=True):
        found, real = (set(entities([names[i] for i in tags.tolist()])) for tags in (each, other))
        right, count = right + len(found & real), count + len(found) + len(real)
    return 2 * right / count if count else 0.0


def entities(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Yield (type, begin, end) of each entity."""
    kind: str | None = None
    begin, before = 0, "O"
    for i, tag in enumerate([*tags, "O"]):
        mark, _, type_ = tag.partition("-") if tag[:2] in _MARKS else ("O", "", "")
        if kind is not None and (mark in "BSO" or before in "ES" or type_ != kind):
            yield kind, begin, i
            kind = None
        if mark != "O" and kind is None:
            kind, begin = type_, i
        before = mark


@torch.no_grad()
def tagged(model: Any, tokenizer: PreTrainedTokenizerBase, text: str, labels: Sequence[str], max_length: int) -> str:
    """Return the words of `text`, each followed by its most likely tag: `word/TAG`.

    Raises:
        PeftcoreError: the text has no words, or more tokens than the model has positions for.
    """
    words = text.split()
    ids, firsts = tokens_of(words, tokenizer, max_length)
    if not firsts:
        raise PeftcoreError("the text has no words. Pass another one")
    positions.check(model, len(ids), "Pass a shorter text")
    found = model(input_ids=torch.tensor([ids], device=next(model.parameters()).device)).logits[0].argmax(-1).tolist()
    return " ".join(f"{word}/{labels[found[place]]}" for word, place in zip(words, firsts, strict=False))
