"""Examples of a run: read, divided into training and held-out examples, and encoded, data set by data set."""

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
        """Return the row of a table under `TITLES`."""
        losses = ("-" if loss is None else f"{loss:.4f}" for loss in (self.before, self.after))
        name = os.path.basename(self.path) or self.path
        return (name, f"{self.weight:g}", f"{self.rows:,}", f"{self.tokens:,}", f"{self.held_out:,}", *losses)


TITLES = ("data set", "weight", "examples", "tokens", "held out", "loss before", "loss after")


_PROBED = 100  # first lines of streamed examples, on which operators are probed


@dataclass(frozen=True)
class Rows:
    """Examples of a run as its files have them.

    Attributes:
        train: training examples; of streamed ones the first.
        held_out: examples that are measured.
        validation: examples kept to choose among runs.
        lines: the lines of streamed examples, or None.
        kept: indices of the lines that are held out.
    """

    train: list[Row]
    held_out: list[Row]
    validation: list[Row] = field(default_factory=list)
    lines: streamed.Lines | None = None
    kept: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Examples:
    """Encoded examples of a run.

    Attributes:
        sets: training examples by the index of their data set.
        rows: what is trained on: the training examples, packed with `--pack`; of streamed ones the first.
        dataset: what the trainer reads: `rows`, or streamed lines.
        parts: (number, weight) of each data set of `dataset`.
        sizes: number of tokens of each row.
        longest: the largest number of tokens.
        held_out: examples that are measured.
        held_out_sets: examples held out of several data sets, by their index; else empty.
        validation: examples kept to choose among runs.
        other: examples of another domain.
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
        """Training examples, not packed."""
        return [example for part in self.sets.values() for example in part]


def read(settings: Settings) -> Rows:
    """Read the examples of a run without `--streaming`, see `split`."""
    names = parse_columns(settings.columns)
    rows = row_reading.read_rows(settings.data, settings.task, names)
    held_out = None
    if settings.eval_data is not None:
        held_out = row_reading.read_rows(settings.eval_data, settings.task, names)
    return split(settings, rows, held_out)


def split(settings: Settings, rows: list[Row] | streamed.Lines, held_out: list[Row] | None) -> Rows:
    """Return the examples of a run, divided.

    Args:
        settings: of the run.
        rows: the examples of `--data`.
        held_out: those of `--eval-data`, or None to hold some of `rows` out.

    Raises:
        PeftcoreError: there are too few examples to hold some out.
    """
    if isinstance(rows, streamed.Lines):
        kept: list[int] = []
        if held_out is None:
            kept = streamed.choose_held_out(rows, int(settings.holdout), settings.seed)
            held_out = [rows[index] for index in kept]
        first = itertools.islice((i for i in range(len(rows)) if i not in kept), _PROBED)
        return Rows([rows[i] for i in first], held_out, lines=rows, kept=kept)
    if held_out is None:
        rows, held_out = holdout.split(rows, settings.holdout, settings.seed)
    if settings.validation is None:
        return Rows(rows, held_out)
    train, validation = holdout.split(rows, settings.validation, settings.seed)
    return Rows(train, held_out, validation)


def encode(rows: Rows, settings: Settings, tokenizer: Any, labels: tuple[str, ...]) -> Examples:
    """Return the examples of a run as token ids."""
    lines = rows.lines
    task = registered.find(settings.task)
    task.check_rows(rows.train)
    sets = encode_parts("training" if lines is None else "first", rows.train, settings, tokenizer, labels)
    held_out_sets = encode_parts("held-out", rows.held_out, settings, tokenizer, labels)
    held_out = [example for part in held_out_sets.values() for example in part]
    validation, other = (
        encode_examples(what, some, settings, tokenizer, labels) if some else []
        for what, some in (("validation", rows.validation), ("other", other_rows(settings)))
    )
    is_mixed = len(row_reading.sources(settings.data)) > 1 and lines is None
    if not is_mixed or settings.eval_data is not None:
        held_out_sets = {}  # not held out of the data sets
    found, parts = weighted(sets, settings)
    if settings.pack:
        packed = f"{number(sum(map(len, sets.values())), 'example')} into {number(len(found), 'row')}"
        say(f"packed {packed} of at most {settings.max_length} tokens")
    sizes = task.lengths(found)
    dataset: Any = found
    longest = max(sizes)
    if lines is not None:

        def encode_some(some: list[Row]) -> list[Example]:
            return task.encode(some, tokenizer, settings.max_length, may_be_empty=True).examples

        dataset, longest = streamed.EncodedLines(lines, encode_some, rows.kept), settings.max_length
        parts = [(len(dataset), 1.0)]
        read = f"{number(len(dataset), 'line')} of {number(len(lines.files), 'file')}"
        say(f"{read} are read when a batch needs them; texts are cut at {longest} tokens")
    return Examples(
        sets, found, dataset, parts, sizes, longest, held_out, held_out_sets, validation, other, is_mixed=is_mixed
    )


def other_rows(settings: Settings) -> list[Row]:
    """Return texts of another domain, whose loss shows what is forgotten; empty if there are none."""
    return [] if settings.other_data is None else row_reading.read_rows(settings.other_data, settings.task)


def encode_examples(
    what: str, rows: Sequence[Row], settings: Settings, tokenizer: Any, labels: tuple[str, ...]
) -> list[Example]:
    """Return rows as token ids; `what` describes them in the warning about truncation."""
    parts = encode_parts(what, rows, settings, tokenizer, labels)
    return [example for part in parts.values() for example in part]


def encode_parts(
    what: str, rows: Sequence[Row], settings: Settings, tokenizer: Any, labels: tuple[str, ...]
) -> dict[int, list[Example]]:
    """Like `encode_examples`, but by data set: {index: examples}, without those that `rows` have no example of."""
    found, task = {}, registered.find(settings.task)
    truncated = left_out = 0
    for source, some in itertools.groupby(rows, key=lambda row: row.source):
        encoded = task.encode(list(some), tokenizer, settings.max_length, labels)
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


def weighted(parts: dict[int, list[Example]], settings: Settings) -> tuple[list[Example], list[tuple[int, float]]]:
    """Return the rows to train on, and the (number, weight) of each data set among them.

    Packed rows mix data sets only if all weights are equal.
    """
    weights = [source.weight for source in row_reading.sources(settings.data)]
    if len(set(weights)) == 1:
        parts, weights = {0: [example for part in parts.values() for example in part]}, weights[:1]
    if settings.pack:
        parts = {source: packing.pack(part, settings.max_length) for source, part in parts.items()}
    rows = [row for part in parts.values() for row in part]
    return rows, [(len(part), weights[source]) for source, part in parts.items()]


def draws(parts: Sequence[tuple[int, float]]) -> int:
    """Return the number of rows of an epoch."""
    return sum(mixture.count(size, weight) for size, weight in parts)


def facts(
    settings: Settings,
    rows: Sequence[Row],
    examples: Examples,
    before: dict[int, float],
    after: dict[int, float],
) -> list[DataSet]:
    """Return the facts about each of several data sets; none of a single one."""
    if not examples.is_mixed:
        return []
    found, task = [], registered.find(settings.task)
    for i, source in enumerate(row_reading.sources(settings.data)):
        count = sum(row.source == i for row in rows)
        size = sum(task.lengths(examples.sets.get(i, [])))
        held = len(examples.held_out_sets.get(i, []))
        found.append(DataSet(source.path, source.weight, count, size, held, before.get(i), after.get(i)))
    return found


def fit_max_length(settings: Settings) -> Settings:
    """Return the settings of a run with `--streaming`, whose longest text is not known, with a length that fits."""
    if not settings.streaming:
        return settings
    try:
        model = models.empty_model(settings.model, settings.task)
    except PeftcoreError:  # code of the model's repository; `check_positions` compares --max-length
        return settings
    known = positions.number_of_positions(model)
    if known is None or settings.max_length <= known:
        return settings
    warn(
        f"{type(model).__name__} has positions for {known:,} tokens: texts are cut there, and not at --max-length "
        f"{settings.max_length}"
    )
    return replace(settings, max_length=known)


def check_positions(model: nn.Module, settings: Settings, examples: Examples) -> None:
    """Raise a PeftcoreError if the model has no position for each token of a run's examples, packed or not."""
    if not registered.find(settings.task).has_positions:
        return
    packed = [len(each["input_ids"]) for each in examples.train] if settings.pack else []
    positions.check(model, max(packed, default=examples.longest))
