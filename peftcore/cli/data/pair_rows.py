"""Rows of `--task pairs`: texts that belong together, also with one that does not, or with a score."""

from __future__ import annotations

from typing import Any

from peftcore.cli.data import labels
from peftcore.cli.data.labels import text_of
from peftcore.cli.data.row import Row
from peftcore.errors import PeftcoreError

KEYS = (
    ("anchor", "positive", "negative"),
    ("anchor", "positive"),
    ("query", "positive", "negative"),
    ("query", "positive"),
    ("sentence1", "sentence2", "score"),
    ("text", "text_pair", "score"),
)


def is_pairs(names: Any) -> bool:
    """Return whether a row's names are those of `--task pairs` and of no other task."""
    return any(set(keys) <= set(names) for keys in KEYS)


def row_of(where: str, keys: tuple[str, ...], fields: dict[str, Any]) -> Row:
    """Return a pair, a triplet or a scored pair.

    Raises:
        PeftcoreError: a text is empty, or the score is not a number from -1 to 1; the message begins with `where`.
    """
    names = [key for key in keys if key != "score"]
    texts = [text_of(where, key, fields[key]) for key in names]
    empty = next((key for key, text in zip(names, texts, strict=True) if not text.strip()), None)
    if empty is not None:
        raise PeftcoreError(f"{where}: '{empty}' is empty")
    score: float | None = None
    if "score" in keys:
        score = labels.number(fields["score"])
        if score is None or not -1 <= score <= 1:
            raise PeftcoreError(
                f"{where}: 'score' must be a number from -1 to 1, as cosines are, found "
                f"{labels.short(fields['score'])}. Divide scores by the largest, such as 5"
            )
    return Row(where, texts[0], pair=texts[1], negative=texts[2] if len(texts) > 2 else None, label=score)
