"""Rows of token ids: `{"input_ids": [...], "labels": [...]}`, written by another program with the model's tokenizer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from peftcore.errors import PeftcoreError

IGNORED = -100


def tokens_of(where: str, fields: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Return (ids, labels) of a row without the padding that `attention_mask` marks; labels default to the ids.

    Raises:
        PeftcoreError: a list is missing, has another length or other values; the message begins with `where`.
    """
    ids = _whole_numbers(where, "input_ids", fields["input_ids"])
    given = {name: fields.get(name) for name in ("labels", "attention_mask")}
    labels, mask = (None if each is None else _whole_numbers(where, name, each) for name, each in given.items())
    for name, values in (("labels", labels), ("attention_mask", mask)):
        if values is not None and len(values) != len(ids):
            raise PeftcoreError(f"{where}: '{name}' has {len(values)} values, but 'input_ids' has {len(ids)}")
    labels = list(ids) if labels is None else labels
    if mask is not None:
        kept = [i for i, value in enumerate(mask) if value]
        ids, labels = [ids[i] for i in kept], [labels[i] for i in kept]
    wrong = next(
        (i for i, (id_, label) in enumerate(zip(ids, labels, strict=True)) if label not in (id_, IGNORED)), None
    )
    if wrong is not None:
        raise PeftcoreError(
            f"{where}: labels[{wrong}] must be input_ids[{wrong}]={ids[wrong]} or {IGNORED} (not learned), found "
            f"{labels[wrong]}. The model shifts labels itself"
        )
    if all(label == IGNORED for label in labels[1:]):
        raise PeftcoreError(f"{where}: no token is learned. Leave out 'labels' to learn all of them")
    return ids, labels


def check_vocabulary(where: str, ids: Sequence[int], size: int) -> None:
    """Raise a PeftcoreError if an id is not in a vocabulary of `size` tokens."""
    wrong = next((id_ for id_ in ids if not 0 <= id_ < size), None)
    if wrong is not None:
        raise PeftcoreError(
            f"{where}: 'input_ids' has the token {wrong}, but the model's tokenizer has {size:,}. Tokenize with the "
            "tokenizer of --model"
        )


def _whole_numbers(where: str, key: str, value: Any) -> list[int]:
    if isinstance(value, str):  # of CSV files
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, list) or not value or any(type(each) is not int for each in value):
        raise PeftcoreError(f"{where}: '{key}' must be a list of whole numbers, found {str(value)[:80]}")
    return value
