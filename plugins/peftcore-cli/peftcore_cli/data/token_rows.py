"""Rows that are already tokenized: `{"input_ids": [...], "labels": [...]}`."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from peftcore.errors import PeftcoreError

IGNORE_INDEX = -100


def tokens_of(location: str, fields: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Return (ids, labels) of a row, without the tokens that `attention_mask` excludes. Labels default to the ids.

    Raises:
        PeftcoreError: a list is missing, has the wrong length or has invalid values. The message begins with
            `location`.
    """
    ids = _integers(location, "input_ids", fields["input_ids"])
    labels = list(ids)
    if fields.get("labels") is not None:
        labels = _integers(location, "labels", fields["labels"], len(ids))
    if fields.get("attention_mask") is not None:
        mask = _integers(location, "attention_mask", fields["attention_mask"], len(ids))
        ids, labels = list(itertools.compress(ids, mask)), list(itertools.compress(labels, mask))
    mismatch = next(
        (i for i, (id_, label) in enumerate(zip(ids, labels, strict=True)) if label not in (id_, IGNORE_INDEX)), None
    )
    if mismatch is not None:
        raise PeftcoreError(
            f"{location}: labels[{mismatch}] must be input_ids[{mismatch}]={ids[mismatch]} or {IGNORE_INDEX} "
            f"(ignored), found {labels[mismatch]}. Pass unshifted labels, because the model shifts them"
        )
    if all(label == IGNORE_INDEX for label in labels[1:]):
        raise PeftcoreError(f"{location}: the labels ignore every token. Remove 'labels' to learn all tokens")
    return ids, labels


def check_vocabulary(location: str, ids: Sequence[int], size: int) -> None:
    """Raise a PeftcoreError if an id is not in a vocabulary of `size` tokens."""
    unknown = next((id_ for id_ in ids if not 0 <= id_ < size), None)
    if unknown is not None:
        raise PeftcoreError(
            f"{location}: 'input_ids' has the token {unknown}, but the model's tokenizer has {size:,} tokens. Tokenize "
            "the data with the tokenizer of --model"
        )


def _integers(location: str, key: str, value: Any, length: int | None = None) -> list[int]:
    if isinstance(value, str):  # of CSV files
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, list) or not value or any(type(item) is not int for item in value):
        raise PeftcoreError(f"{location}: '{key}' must be a list of integers, found {str(value)[:80]}")
    if length is not None and len(value) != length:
        raise PeftcoreError(
            f"{location}: '{key}' has {len(value)} values, but 'input_ids' has {length}. Pass lists of equal length"
        )
    return value
