"""Rows that are already tokenized: `{"input_ids": [...], "labels": [...]}`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from peftcore.errors import PeftcoreError

IGNORE_INDEX = -100


def tokens_of(where: str, fields: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Return (ids, labels) of a row, without the tokens that `attention_mask` excludes. Labels default to the ids.

    Raises:
        PeftcoreError: a list is missing, has the wrong length or has invalid values. The message begins with `where`.
    """
    ids = _integers(where, "input_ids", fields["input_ids"])
    values_by_name = {name: fields.get(name) for name in ("labels", "attention_mask")}
    labels, mask = (None if each is None else _integers(where, name, each) for name, each in values_by_name.items())
    for name, values in (("labels", labels), ("attention_mask", mask)):
        if values is not None and len(values) != len(ids):
            raise PeftcoreError(f"{where}: '{name}' has {len(values)} values, but 'input_ids' has {len(ids)}")
    labels = list(ids) if labels is None else labels
    if mask is not None:
        token_indices = [i for i, value in enumerate(mask) if value]
        ids, labels = [ids[i] for i in token_indices], [labels[i] for i in token_indices]
    mismatch = next(
        (i for i, (id_, label) in enumerate(zip(ids, labels, strict=True)) if label not in (id_, IGNORE_INDEX)), None
    )
    if mismatch is not None:
        raise PeftcoreError(
            f"{where}: labels[{mismatch}] must be input_ids[{mismatch}]={ids[mismatch]} or {IGNORE_INDEX} (ignored), "
            f"found {labels[mismatch]}. Pass unshifted labels, because the model shifts them"
        )
    if all(label == IGNORE_INDEX for label in labels[1:]):
        raise PeftcoreError(f"{where}: the labels ignore every token. Remove 'labels' to learn all tokens")
    return ids, labels


def check_vocabulary(where: str, ids: Sequence[int], size: int) -> None:
    """Raise a PeftcoreError if an id is not in a vocabulary of `size` tokens."""
    unknown = next((id_ for id_ in ids if not 0 <= id_ < size), None)
    if unknown is not None:
        raise PeftcoreError(
            f"{where}: 'input_ids' has the token {unknown}, but the model's tokenizer has {size:,} tokens. Tokenize "
            "the data with the tokenizer of --model"
        )


def _integers(where: str, key: str, value: Any) -> list[int]:
    if isinstance(value, str):  # of CSV files
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, list) or not value or any(type(item) is not int for item in value):
        raise PeftcoreError(f"{where}: '{key}' must be a list of integers, found {str(value)[:80]}")
    return value
