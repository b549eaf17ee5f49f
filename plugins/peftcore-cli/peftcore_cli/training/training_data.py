"""The examples of a run: read them, split them into training and held-out examples, and encode each data set."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from peftcore.errors import PeftcoreError
from peftcore_cli.bases import models
from peftcore_cli.console import number, say, warn
from peftcore_cli.data import holdout, mixture, row_reading, streamed
from peftcore_cli.data.data_files import parse_columns
from peftcore_cli.data.row import Row
from peftcore_cli.settings import Settings
from peftcore_cli.tasks import packing, positions, registered
from peftcore_cli.tasks.encoded_examples import Example


@dataclass(frozen=True)
class DataSet:
    """Figures of one data set in a mixture: its training examples and tokens, and its held-out loss.

    `before` and `after` are the held-out loss before and after training; None if no example of the data set is held
    out.
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
        """Return the row of a table with the columns `TITLES`."""
        losses = ("-" if loss is None else f"{loss:.4f}" for loss in (self.before, self.after))
        name = os.path.basename(self.path) or self.path
        return (name, f"{self.weight:g}", f"{self.rows:,}", f"{self.tokens:,}", f"{self.held_out:,}", *losses)


TITLES = ("data set", "weight", "examples", "tokens", "held out", "loss before", "loss after")


_FIRST_LINES = 100  # streamed examples read before training, to choose fused operators


@dataclass(frozen=True)
class Rows:
    """Examples of a run before encoding.

    Attributes:
        train: training examples; with --streaming, the first `_FIRST_LINES` of them.
        held_out: examples for evaluation.
        validation: examples set aside to choose among runs.
        lines: all lines, with --streaming.
        held_out_lines: indices of the held-out lines, with --streaming.
    """

    train: list[Row]
    held_out: list[Row]
    validation: list[Row] = field(default_factory=list)
    lines: streamed.Lines | None = None
    held_out_lines: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Examples:
    """Encoded examples of a run.

    Attributes:
        sets: training examples by the index of their data set.
        rows: examples to train on, packed with --pack; with --streaming, the first `_FIRST_LINES` of them.
        dataset: the trainer's dataset: `rows`, or streamed lines.
        parts: (number of examples, weight) of each data set in `dataset`.
        sizes: number of tokens of each row.
        longest: maximum number of tokens of a row.
        held_out: examples for evaluation.
        held_out_sets: held-out examples by the index of their data set; empty for a single data set.
        validation: examples set aside to choose among runs.
        other: examples from another domain.
        is_mixed: whether there are several data sets.
    """

    sets: dict[int, list[Example]]
    rows: list[Example]
    dataset: Any
    parts: list[tuple[int, float]]
    sizes: list[int]
    longest: int
    held_out: list[Example]
    held_out_sets: dict[int, list[Example]]
    validation: list[Example]
    other: list[Example]
    is_mixed: bool

    @property
    def train(self) -> list[Example]:
        """Training examples before packing."""
        return [example for part in self.sets.values() for example in part]


def read(settings: Settings) -> Rows:
    """Read and split the examples of a run without `--streaming`."""
    names = parse_columns(settings.columns)
    rows = row_reading.read_rows(settings.data, settings.task, names)
    held_out = None
    if settings.eval_data is not None:
        held_out = row_reading.read_rows(settings.eval_data, settings.task, names)
    return split(settings, rows, held_out)


def split(settings: Settings, rows: list[Row] | streamed.Lines, held_out: list[Row] | None) -> Rows:
    """Split the examples of a run.

    Args:
        settings: settings of the run.
        rows: the examples of `--data`.
        held_out: the examples of `--eval-data`, or None to hold out some of `rows`.

    Raises:
        PeftcoreError: there are too few examples to hold some out.
    """
    if isinstance(rows, streamed.Lines):
        held_out_lines: list[int] = []
        if held_out is None:
            held_out_lines = streamed.choose_held_out(rows, int(settings.holdout), settings.seed)
            held_out = [rows[index] for index in held_out_lines]
        first_lines = itertools.islice((i for i in range(len(rows)) if i not in held_out_lines), _FIRST_LINES)
        return Rows([rows[i] for i in first_lines], held_out, lines=rows, held_out_lines=held_out_lines)
    if held_out is None:
        rows, held_out = holdout.split(rows, settings.holdout, settings.seed)
    if settings.validation is None:
        return Rows(rows, held_out)
    train, validation = holdout.split(rows, settings.validation, settings.seed)
    return Rows(train, held_out, validation)


def encode(rows: Rows, settings: Settings, tokenizer: Any, labels: tuple[str, ...]) -> Examples:
    """Encode the examples of a run."""
    lines = rows.lines
    task = registered.find(settings.task)
    task.check_rows(rows.train)
    sets = encode_parts("training" if lines is None else "first", rows.train, settings, tokenizer, labels)
    held_out_sets = encode_parts("held-out", rows.held_out, settings, tokenizer, labels)
    held_out = [example for part in held_out_sets.values() for example in part]
    validation, other = [
        encode_examples(label, extra_rows, settings, tokenizer, labels) if extra_rows else []
        for label, extra_rows in (("validation", rows.validation), ("other", other_rows(settings)))
    ]
    is_mixed = len(row_reading.sources(settings.data)) > 1 and lines is None
    if not is_mixed or settings.eval_data is not None:
        held_out_sets = {}  # held-out examples cannot be attributed to data sets
    rows_to_train, parts = rows_and_parts(sets, settings)
    if settings.pack:
        summary = f"{number(sum(map(len, sets.values())), 'example')} into {number(len(rows_to_train), 'row')}"
        say(f"packed {summary} of at most {settings.max_length} tokens")
    sizes = task.lengths(rows_to_train)
    dataset: Any = rows_to_train
    longest = max(sizes)
    if lines is not None:

        def encode_some(lines_to_encode: list[Row]) -> list[Example]:
            return task.encode(lines_to_encode, tokenizer, settings.max_length, may_be_empty=True).examples

        dataset, longest = streamed.EncodedLines(lines, encode_some, rows.held_out_lines), settings.max_length
        parts = [(len(dataset), 1.0)]
        count = f"{number(len(dataset), 'line')} of {number(len(lines.files), 'file')}"
        say(f"streaming {count}; texts are truncated at {longest} tokens")
    return Examples(
        sets,
        rows_to_train,
        dataset,
        parts,
        sizes,
        longest,
        held_out,
        held_out_sets,
        validation,
        other,
        is_mixed=is_mixed,
    )


def other_rows(settings: Settings) -> list[Row]:
    """Return the texts of --other-data, whose loss measures forgetting; an empty list without --other-data."""
    return [] if settings.other_data is None else row_reading.read_rows(settings.other_data, settings.task)


def encode_examples(
    label: str, rows: Sequence[Row], settings: Settings, tokenizer: Any, labels: tuple[str, ...]
) -> list[Example]:
    """Encode rows into one list. `label` describes the rows in warnings."""
    parts = encode_parts(label, rows, settings, tokenizer, labels)
    return [example for part in parts.values() for example in part]


def encode_parts(
    label: str, rows: Sequence[Row], settings: Settings, tokenizer: Any, labels: tuple[str, ...]
) -> dict[int, list[Example]]:
    """Encode rows as {index of the data set: examples}. `label` describes the rows in warnings."""
    examples_by_set, task = {}, registered.find(settings.task)
    truncated = left_out = 0
    for source, group in itertools.groupby(rows, key=lambda row: row.source):
        encoded = task.encode(list(group), tokenizer, settings.max_length, labels)
        examples_by_set[source] = encoded.examples
        truncated, left_out = truncated + encoded.truncated, left_out + encoded.left_out
    if truncated:
        warn(
            f"{truncated:,} of {len(rows):,} {label} examples were truncated or split, because they are longer than "
            f"{settings.max_length} tokens (--max-length)"
        )
    if left_out:
        warn(f"{left_out:,} {label} examples were dropped, because they have no token to learn within --max-length")
    return examples_by_set


def rows_and_parts(
    parts: dict[int, list[Example]], settings: Settings
) -> tuple[list[Example], list[tuple[int, float]]]:
    """Return the rows to train on, and (number of rows, weight) for each data set.

    Packed rows mix data sets only if all weights are equal.
    """
    weights = [source.weight for source in row_reading.sources(settings.data)]
    if len(set(weights)) == 1:
        parts, weights = {0: [example for part in parts.values() for example in part]}, weights[:1]
    if settings.pack:
        parts = {source: packing.pack(part, settings.max_length) for source, part in parts.items()}
    rows = [row for part in parts.values() for row in part]
    return rows, [(len(part), weights[source]) for source, part in parts.items()]


def rows_per_epoch(parts: Sequence[tuple[int, float]]) -> int:
    """Return the number of rows per epoch."""
    return sum(mixture.count(size, weight) for size, weight in parts)


def facts(
    settings: Settings,
    rows: Sequence[Row],
    examples: Examples,
    before: dict[int, float],
    after: dict[int, float],
) -> list[DataSet]:
    """Return the figures of each data set in a mixture; an empty list for a single data set."""
    if not examples.is_mixed:
        return []
    data_sets, task = [], registered.find(settings.task)
    for i, source in enumerate(row_reading.sources(settings.data)):
        count = sum(row.source == i for row in rows)
        size = sum(task.lengths(examples.sets.get(i, [])))
        held_out = len(examples.held_out_sets.get(i, []))
        data_sets.append(DataSet(source.path, source.weight, count, size, held_out, before.get(i), after.get(i)))
    return data_sets


def fit_max_length(settings: Settings) -> Settings:
    """Reduce --max-length to the model's number of positions if --streaming hides the lengths of the texts."""
    if not settings.streaming:
        return settings
    try:
        model = models.empty_model(settings.model, settings.task)
    except PeftcoreError:  # a model with its own code, which `check_positions` checks after it is loaded
        return settings
    limit = positions.number_of_positions(model)
    if limit is None or settings.max_length <= limit:
        return settings
    warn(
        f"{type(model).__name__} only has positions for {limit:,} tokens, so --max-length {settings.max_length} is "
        f"reduced to {limit}"
    )
    return replace(settings, max_length=limit)


def check_positions(model: nn.Module, settings: Settings, examples: Examples) -> None:
    """Raise a PeftcoreError if an example, before packing, has more tokens than the model has positions."""
    if not registered.find(settings.task).has_positions:
        return
    lengths = [len(example["input_ids"]) for example in examples.train] if settings.pack else []
    positions.check(model, max(lengths, default=examples.longest))
