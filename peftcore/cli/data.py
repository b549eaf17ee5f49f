"""Read examples from JSONL and TSV files; every error names the file and the line.

Language modelling: `{"text": ...}`, or `{"prompt": ..., "completion": ...}`, where only the completion
is learned. Classification: `{"text": ..., "label": ...}`, as JSONL or as TSV with a header line.
"""

from __future__ import annotations

import csv
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from peftcore.errors import PeftcoreError, nearest

LANGUAGE_MODEL = "causal-lm"
CLASSIFICATION = "classification"
TASKS = (LANGUAGE_MODEL, CLASSIFICATION)

_KEYS = {LANGUAGE_MODEL: (("text",), ("prompt", "completion")), CLASSIFICATION: (("text", "label"),)}


@dataclass(frozen=True)
class Row:
    """One example. `where` is `FILE:LINE`; `text` is the prompt where there is a completion."""

    where: str
    text: str
    completion: str | None = None
    label: str | None = None


def check_task(task: str) -> None:
    """Raise a PeftcoreError unless `task` is one of :data:`TASKS`."""
    if task not in TASKS:
        raise PeftcoreError(f"--task is one of {', '.join(TASKS)}, found '{task}'")


def read_rows(path: str | os.PathLike[str], task: str) -> list[Row]:
    """All examples of a file.

    Raises:
        PeftcoreError: the file is missing, empty or of another kind, or a line is wrong.
    """
    check_task(task)
    rows = [_row(where, fields, task) for where, fields in _records(Path(path))]
    if not rows:
        raise PeftcoreError(f"'{path}' holds no example")
    kinds = {row.completion is None for row in rows}
    if task == LANGUAGE_MODEL and len(kinds) == 2:
        odd = next(row for row in rows if (row.completion is None) != (rows[0].completion is None))
        raise PeftcoreError(
            f"{odd.where}: text and prompt/completion are mixed in one file; the first line has "
            f"{'text' if rows[0].completion is None else 'prompt/completion'}. Split the file in two"
        )
    return rows


def guess_task(path: str | os.PathLike[str]) -> str:
    """The task that the first line of a file is an example of."""
    for _, fields in _records(Path(path)):
        return CLASSIFICATION if "label" in fields else LANGUAGE_MODEL
    raise PeftcoreError(f"'{path}' holds no example")


def hold_out(rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(rest, held-out) by a random choice that depends on `seed` alone.

    Raises:
        PeftcoreError: `share` is not within (0, 1), or there are fewer than two rows.
    """
    if not 0 < share < 1:
        raise PeftcoreError(f"the share to hold out must be between 0 and 1, found {share:g}")
    if len(rows) < 2:
        raise PeftcoreError("one example cannot be split. Give another file to evaluate on: --eval-data FILE")
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    count = min(max(1, round(share * len(rows))), len(rows) - 1)
    held = set(order[:count])
    return [r for i, r in enumerate(rows) if i not in held], [r for i, r in enumerate(rows) if i in held]


def labels_of(rows: list[Row]) -> list[str]:
    """The distinct labels, numbers in numeric order, else alphabetically.

    Raises:
        PeftcoreError: there is only one.
    """
    labels = {row.label for row in rows if row.label is not None}
    if len(labels) < 2:
        raise PeftcoreError(f"{rows[0].where}: every example has the label {labels}; a classifier needs two or more")
    try:
        return sorted(labels, key=float)
    except ValueError:
        return sorted(labels)


def label_ids(rows: list[Row], labels: list[str]) -> list[int]:
    """Each row's label as its index in `labels`.

    Raises:
        PeftcoreError: a label is not among them.
    """
    index: dict[str | None, int] = {label: i for i, label in enumerate(labels)}
    for row in rows:
        if row.label not in index:
            raise PeftcoreError(
                f"{row.where}: the label '{row.label}' is unknown{nearest(row.label or '', labels)}. "
                f"The model knows: {', '.join(labels)}"
            )
    return [index[row.label] for row in rows]


def _records(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """(FILE:LINE, fields) of every line that is not blank."""
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".tsv"):
        raise PeftcoreError(f"'{path}': examples are read from .jsonl and .tsv files, found '{suffix}'")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from (_tsv if suffix == ".tsv" else _jsonl)(path, file)
    except UnicodeDecodeError as error:
        raise PeftcoreError(f"'{path}' is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise PeftcoreError(f"'{path}' cannot be read: {error.strerror or error}") from error


def _jsonl(path: Path, file: Iterator[str]) -> Iterator[tuple[str, dict[str, object]]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise PeftcoreError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(fields, dict):
            raise PeftcoreError(f"{where}: expected a JSON object, found {type(fields).__name__}")
        yield where, fields


def _tsv(path: Path, file: Iterator[str]) -> Iterator[tuple[str, dict[str, object]]]:
    # Quotes have no meaning: reviews and tweets are full of single ones.
    lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    header = next(lines, None)
    if header is None:
        return
    if "text" not in header or "label" not in header:
        raise PeftcoreError(f"{path}:1: the first line must name the columns text and label, found {header}")
    for number, values in enumerate(lines, 2):
        if not values:
            continue
        if len(values) != len(header):
            raise PeftcoreError(f"{path}:{number}: {len(values)} columns, the first line names {len(header)}")
        yield f"{path}:{number}", dict(zip(header, values, strict=True))


def _row(where: str, fields: dict[str, object], task: str) -> Row:
    keys = next((keys for keys in _KEYS[task] if all(key in fields for key in keys)), None)
    if keys is None:
        wanted = " or ".join("/".join(keys) for keys in _KEYS[task])
        raise PeftcoreError(f"{where}: {task} needs the keys {wanted}, found {', '.join(fields) or 'none'}")
    for key in keys:
        value = fields[key]
        if key == "label" and isinstance(value, (int, str)):
            continue
        if not isinstance(value, str):
            raise PeftcoreError(f"{where}: '{key}' must be text, found {json.dumps(value, ensure_ascii=False)[:80]}")
    if not str(fields[keys[-1]]).strip():
        raise PeftcoreError(f"{where}: '{keys[-1]}' is empty")
    if task == CLASSIFICATION:
        return Row(where, str(fields["text"]), label=str(fields["label"]))
    if keys == ("text",):
        return Row(where, str(fields["text"]))
    return Row(where, str(fields["prompt"]), completion=str(fields["completion"]))
