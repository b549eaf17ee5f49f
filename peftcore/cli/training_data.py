"""Examples of a run: read, divided into training and held-out examples, and encoded, data set by data set."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from peftcore.cli import comparisons, data, holdout, mixture, packing, streamed, tasks
from peftcore.cli.console import warn
from peftcore.cli.data_files import parsed_columns
from peftcore.cli.metrics import Metrics
from peftcore.cli.row import Row
from peftcore.cli.settings import Settings


@dataclass(frozen=True)
class DataSet:
    """Facts about one of several data sets: training examples and their tokens, and the held-out loss.

    `before` and `after` are None if no example is held out of this data set.
    """

    path: str
    weight: float
    rows: int
    tokens: int
    held_out: int
    before: float | None
    after: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def cells(self) -> tuple[str, ...]:
        """Return the row of a table under :data:`TITLES`."""
        losses = ("-" if loss is None else f"{loss:.4f}" for loss in (self.before, self.after))
        name = os.path.basename(self.path) or self.path
        return (name, f"{self.weight:g}", f"{self.rows:,}", f"{self.tokens:,}", f"{self.held_out:,}", *losses)


TITLES = ("data set", "weight", "examples", "tokens", "held out", "loss before", "loss after")


def streamed_splits(settings: Settings) -> tuple[streamed.Lines, list[int], list[Row]]:
    """Return (lines, indices of those that are held out, held-out examples).

    Raises:
        PeftcoreError: a file is missing or of another kind, or nothing is held out.
    """
    names = parsed_columns(settings.columns)
    paths = [settings.data] if isinstance(settings.data, str) else settings.data
    lines = streamed.Lines(paths, settings.task, names)
    if settings.eval_data is not None:
        return lines, [], data.read_rows(settings.eval_data, settings.task, names)
    kept = streamed.chosen(lines, int(settings.holdout), settings.seed)
    return lines, kept, [lines[index] for index in kept]


def read_splits(settings: Settings) -> tuple[list[Row], list[Row], list[Row]]:
    """Return (training examples, held-out examples, examples kept to choose among runs)."""
    names = parsed_columns(settings.columns)
    rows = data.read_rows(settings.data, settings.task, names)
    if settings.eval_data is not None:
        held_out = data.read_rows(settings.eval_data, settings.task, names)
    else:
        rows, held_out = holdout.split(rows, settings.holdout, settings.seed)
    if settings.validation is None:
        return rows, held_out, []
    train, validation = holdout.split(rows, settings.validation, settings.seed)
    return train, held_out, validation


def other_rows(settings: Settings) -> list[Row]:
    """Return texts of another domain, whose loss shows what is forgotten; empty if there are none."""
    return [] if settings.other_data is None else data.read_rows(settings.other_data, settings.task)


def encode_examples(
    what: str, rows: Sequence[Row], settings: Settings, tokenizer: Any, labels: tuple[str, ...]
) -> list[tasks.Example]:
    """Return rows as token ids; `what` describes them in the warning about truncation."""
    parts = encode_parts(what, rows, settings, tokenizer, labels)
    return [example for part in parts.values() for example in part]


def encode_parts(
    what: str, rows: Sequence[Row], settings: Settings, tokenizer: Any, labels: tuple[str, ...]
) -> dict[int, list[tasks.Example]]:
    """Like `encode_examples`, but by data set: {index: examples}, without those that `rows` have no example of."""
    found = {}
    truncated = left_out = 0
    for source, some in itertools.groupby(rows, key=lambda row: row.source):
        if settings.task in data.COMPARED:
            encoded = comparisons.of(settings.task).encode(list(some), tokenizer, settings.max_length)
        else:
            encoded = tasks.encode(list(some), settings.task, tokenizer, settings.max_length, labels)
        found[source] = encoded.examples
        truncated, left_out = truncated + encoded.truncated, left_out + encoded.left_out
    if truncated:
        warn(
            f"{truncated:,} of {len(rows):,} {what} examples are longer than {settings.max_length} "
            "tokens (--max-length) and were truncated or split"
        )
    if left_out:
        warn(f"{left_out:,} of them have no tokens to train on within that length and are left out")
    return found


def weighted(
    parts: dict[int, list[tasks.Example]], settings: Settings
) -> tuple[list[tasks.Example], list[tuple[int, float]]]:
    """Return the rows to train on, and the (number, weight) of each data set among them.

    Packed rows mix data sets only if all weights are equal.
    """
    weights = [source.weight for source in data.sources(settings.data)]
    if len(set(weights)) == 1:
        parts, weights = {0: [example for part in parts.values() for example in part]}, weights[:1]
    if settings.pack:
        parts = {source: packing.packed(part, settings.max_length) for source, part in parts.items()}
    rows = [row for part in parts.values() for row in part]
    return rows, [(len(part), weights[source]) for source, part in parts.items()]


def draws(parts: Sequence[tuple[int, float]]) -> int:
    """Return the number of rows of an epoch."""
    return sum(mixture.count(size, weight) for size, weight in parts)


def tokens(examples: Sequence[tasks.Example], task: str) -> int:
    """Return the number of tokens of examples; of a preference, those of the prompt with the longer answer."""
    return sum(lengths(examples, task))


def lengths(examples: Sequence[tasks.Example], task: str) -> list[int]:
    """Return the number of tokens of each example."""
    if task in data.COMPARED:
        return list(comparisons.of(task).lengths(examples))
    return [tasks.length(each) for each in examples]


def losses(
    parts: dict[int, list[tasks.Example]], measure: Callable[[list[tasks.Example]], Metrics]
) -> dict[int, float]:
    """Return the loss on each data set's held-out examples, by its index."""
    return {source: measure(part).loss for source, part in parts.items()}


def facts(
    settings: Settings,
    rows: Sequence[Row],
    train: dict[int, list[tasks.Example]],
    held_out: dict[int, list[tasks.Example]],
    before: dict[int, float],
    after: dict[int, float],
) -> list[DataSet]:
    """Return the facts about each of several data sets."""
    found = []
    for i, source in enumerate(data.sources(settings.data)):
        count = sum(row.source == i for row in rows)
        size = tokens(train.get(i, []), settings.task)
        held = len(held_out.get(i, []))
        found.append(DataSet(source.path, source.weight, count, size, held, before.get(i), after.get(i)))
    return found
