"""Prepare the examples of a run.

`read` reads the files of `--data` and `--eval-data` and splits them into `Rows` for training, evaluation and
validation. `encode` tokenizes these rows into `Examples`, whose `training` set is passed to the trainer. Both keep
their results on disk. Files are parsed in `data/`, and a single row is encoded by its task in `tasks/`.
"""

from __future__ import annotations

import itertools
import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from peftcore.errors import PeftcoreError
from peftcore_cli.bases import models
from peftcore_cli.console import number, say, warn
from peftcore_cli.data import holdout, mixture, row_reading, streamed
from peftcore_cli.data.data_files import parse_columns
from peftcore_cli.data.disk_list import DiskList, LazySequence, Selection
from peftcore_cli.data.row import Row
from peftcore_cli.settings import Settings
from peftcore_cli.tasks import packing, positions, registered
from peftcore_cli.tasks.encoded_examples import Example


@dataclass(frozen=True)
class DataSet:
    """Figures of one data set in a mixture, for the report.

    Attributes:
        path: path or hub id of the data set.
        weight: how often its examples are used per epoch.
        rows: number of training examples.
        tokens: number of tokens of the training examples.
        held_out: number of held-out examples.
        before: loss on the held-out examples before training; None if there are none.
        after: loss on the held-out examples after training; None if there are none.
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
        """Return the cells of a table row with the columns `TITLES`."""
        losses = ["-" if loss is None else f"{loss:.4f}" for loss in (self.before, self.after)]
        name = os.path.basename(self.path) or self.path
        return (name, f"{self.weight:g}", f"{self.rows:,}", f"{self.tokens:,}", f"{self.held_out:,}", *losses)


TITLES = ("data set", "weight", "examples", "tokens", "held out", "loss before", "loss after")

_CHUNK = 100  # rows per call of the tokenizer; with 1,000, it takes 40 % more processor time per row
FIRST_ROWS = 100  # streamed examples encoded before training, to choose fused operators


@dataclass(frozen=True)
class Rows:
    """Examples of a run before encoding, on disk.

    Attributes:
        train: training examples.
        held_out: examples for evaluation.
        validation: examples set aside to choose among runs.
    """

    train: LazySequence[Row]
    held_out: LazySequence[Row]
    validation: Sequence[Row] = ()


@dataclass(frozen=True)
class EncodedSets:
    """Encoded examples of one or several data sets, on disk.

    A data set is identified by its index in `--data`.

    Attributes:
        examples: the examples, sorted by data set.
        sizes: number of tokens of each example.
        counts: number of examples of each data set.
    """

    examples: DiskList[Example]
    sizes: array[int]
    counts: dict[int, int]

    def ranges(self) -> dict[int, range]:
        """Return the indices of the examples of each data set."""
        ranges: dict[int, range] = {}
        begin = 0
        for set_index, count in self.counts.items():
            ranges[set_index] = range(begin, begin + count)
            begin += count
        return ranges

    def by_set(self) -> dict[int, Sequence[Example]]:
        """Return the examples of each data set."""
        return {set_index: Selection(self.examples, indices) for set_index, indices in self.ranges().items()}


@dataclass(frozen=True)
class TrainingSet:
    """The dataset from which the trainer draws batches.

    Attributes:
        dataset: one example per row; with --pack, a row contains several examples.
        lengths: length of each row, to group rows of similar lengths: its number of tokens, or with --streaming, which
            tokenizes rows later, its size on disk.
        weighted_sizes: (number of rows, weight) of each data set. Data sets with equal weights may count as one.
    """

    dataset: Sequence[Example]
    lengths: Sequence[int]
    weighted_sizes: list[tuple[int, float]]

    @property
    def rows_per_epoch(self) -> int:
        """Number of rows per epoch, given the weights."""
        return sum(mixture.count(size, weight) for size, weight in self.weighted_sizes)


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Encoded examples of a run.

    Attributes:
        encoded: training examples before packing; with --streaming, the first `FIRST_ROWS` of them.
        rows: rows of `training.dataset` that are already encoded; with --streaming, the first `FIRST_ROWS` of them.
        training: the trainer's dataset.
        longest: maximum number of tokens of a row.
        held_out: examples for evaluation.
        held_out_sets: held-out examples by the index of their data set; empty for a single data set.
        validation: examples set aside to choose among runs.
        other: examples from another domain.
        is_mixed: whether there are several data sets.
    """

    encoded: EncodedSets
    rows: Sequence[Example]
    training: TrainingSet
    longest: int
    held_out: Sequence[Example]
    held_out_sets: dict[int, Sequence[Example]]
    validation: Sequence[Example]
    other: Sequence[Example]
    is_mixed: bool

    @property
    def train(self) -> Sequence[Example]:
        """Training examples before packing."""
        return self.encoded.examples


def read(settings: Settings) -> Rows:
    """Read and split the examples of a run."""
    names = parse_columns(settings.columns)
    _, rows = row_reading.read(settings.data, settings.task, names)
    held_out = None
    if settings.eval_data is not None:
        _, held_out = row_reading.read(settings.eval_data, settings.task, names)
    return split(settings, rows, held_out)


def split(settings: Settings, rows: LazySequence[Row], held_out: LazySequence[Row] | None) -> Rows:
    """Split the examples of a run.

    Args:
        settings: settings of the run.
        rows: the examples of `--data`.
        held_out: the examples of `--eval-data`, or None to hold out some of `rows`.

    Raises:
        PeftcoreError: there are too few examples to hold some out.
    """
    if held_out is None:
        rows, held_out = holdout.split(rows, settings.holdout, settings.seed)
    if settings.validation is None:
        return Rows(rows, held_out)
    train, validation = holdout.split(rows, settings.validation, settings.seed)
    return Rows(train, held_out, validation)


def encode(rows: Rows, settings: Settings, tokenizer: Any, labels: tuple[str, ...]) -> Examples:
    """Encode the examples of a run; with --streaming, only the first training examples."""
    registered.find(settings.task).check_rows(rows.train)
    if settings.streaming:
        encoded = encode_sets("first", rows.train[:FIRST_ROWS], settings, tokenizer, labels)
    else:
        encoded = encode_sets("training", rows.train, settings, tokenizer, labels)
    held_out = encode_sets("held-out", rows.held_out, settings, tokenizer, labels)
    validation = encode_sets("validation", rows.validation, settings, tokenizer, labels)
    other = encode_sets("other", other_rows(settings), settings, tokenizer, labels)
    is_mixed = len(row_reading.sources(settings.data)) > 1 and not settings.streaming
    # Held-out examples of other files cannot be attributed to data sets.
    held_out_sets = held_out.by_set() if is_mixed and settings.eval_data is None else {}
    training = _training_set(encoded, settings)
    encoded_rows, longest = training.dataset, max(training.lengths)
    if settings.streaming:
        training, longest = _streamed_set(rows.train, settings, tokenizer, labels), settings.max_length
    return Examples(
        encoded=encoded,
        rows=encoded_rows,
        training=training,
        longest=longest,
        held_out=held_out.examples,
        held_out_sets=held_out_sets,
        validation=validation.examples,
        other=other.examples,
        is_mixed=is_mixed,
    )


def other_rows(settings: Settings) -> list[Row]:
    """Return the texts of --other-data, whose loss measures forgetting; an empty list without --other-data."""
    return [] if settings.other_data is None else row_reading.read_rows(settings.other_data, settings.task)


def encode_sets(
    label: str, rows: Sequence[Row], settings: Settings, tokenizer: Any, labels: tuple[str, ...]
) -> EncodedSets:
    """Encode rows in chunks. `label` describes the rows in warnings.

    Raises:
        PeftcoreError: no row of a data set has a token to learn.
    """
    task = registered.find(settings.task)
    examples, sizes, counts = DiskList[Example](), array("I"), dict[int, int]()
    truncated_count = dropped_count = 0
    for set_index, rows_of_set in itertools.groupby(rows, key=lambda row: row.source):
        counts[set_index] = 0
        while chunk := list(itertools.islice(rows_of_set, _CHUNK)):
            encoded = task.encode(chunk, tokenizer, settings.max_length, labels, may_be_empty=True)
            examples.extend(encoded.examples)
            sizes.extend(task.lengths(encoded.examples))
            counts[set_index] += len(encoded.examples)
            truncated_count += encoded.truncated
            dropped_count += encoded.left_out
            last_chunk = chunk
        if not counts[set_index]:
            # Encode rows of the empty data set again, without `may_be_empty`, to raise the task's own error.
            task.encode(last_chunk, tokenizer, settings.max_length, labels)
    if truncated_count:
        warn(
            f"{truncated_count:,} of {len(rows):,} {label} examples were truncated or split, because they are longer "
            f"than {settings.max_length} tokens (--max-length)"
        )
    if dropped_count:
        warn(
            f"{dropped_count:,} {label} examples were dropped, because they have no token to learn within --max-length"
        )
    return EncodedSets(examples, sizes, counts)


def _weighted_sizes(counts: Mapping[int, int], settings: Settings) -> list[tuple[int, float]]:
    """Return (number of examples, weight) of each data set, or of all together if all weights are equal."""
    weights = [source.weight for source in row_reading.sources(settings.data)]
    if len(set(weights)) == 1:
        return [(sum(counts.values()), weights[0])]
    return [(count, weights[set_index]) for set_index, count in counts.items()]


def _training_set(encoded: EncodedSets, settings: Settings) -> TrainingSet:
    """Return the trainer's dataset, packed with --pack. Packed rows mix data sets only if all weights are equal."""
    weighted_sizes = _weighted_sizes(encoded.counts, settings)
    if not settings.pack:
        return TrainingSet(encoded.examples, encoded.sizes, weighted_sizes)
    packed_rows = list[list[int]]()  # indices of the examples in each row
    packed_sizes = list[tuple[int, float]]()
    begin = 0
    for count, weight in weighted_sizes:
        rows_of_set = packing.pack(encoded.sizes[begin : begin + count], settings.max_length)
        for row in rows_of_set:
            packed_rows.append([begin + i for i in row])
        packed_sizes.append((len(rows_of_set), weight))
        begin += count
    summary = f"{number(len(encoded.examples), 'example')} into {number(len(packed_rows), 'row')}"
    say(f"packed {summary} of at most {settings.max_length} tokens")
    lengths = [sum(encoded.sizes[i] for i in row) for row in packed_rows]
    return TrainingSet(packing.PackedRows(encoded.examples, packed_rows), lengths, packed_sizes)


def _streamed_set(rows: LazySequence[Row], settings: Settings, tokenizer: Any, labels: tuple[str, ...]) -> TrainingSet:
    """Return the trainer's dataset with --streaming, which encodes a row when a batch needs it."""
    task = registered.find(settings.task)

    def encode_rows(some_rows: list[Row]) -> list[Example]:
        return task.encode(some_rows, tokenizer, settings.max_length, labels, may_be_empty=True).examples

    dataset = streamed.EncodedRows(rows, encode_rows)
    sizes_on_disk = array("I", map(rows.size, range(len(rows))))
    counts = {set_index: len(indices) for set_index, indices in mixture.ranges(rows).items()}
    say(f"streaming {number(len(dataset), 'row')}; texts are truncated at {settings.max_length} tokens")
    return TrainingSet(dataset, sizes_on_disk, _weighted_sizes(counts, settings))


def data_set_figures(
    settings: Settings,
    rows: Sequence[Row],
    examples: Examples,
    before: Mapping[int, float],
    after: Mapping[int, float],
) -> list[DataSet]:
    """Return the figures of each data set in a mixture; an empty list for a single data set.

    Args:
        settings: settings of the run.
        rows: training examples before encoding.
        examples: encoded examples.
        before: held-out loss of each data set before training, by the index of the data set.
        after: held-out loss of each data set after training, by the index of the data set.
    """
    if not examples.is_mixed:
        return []
    row_ranges, example_ranges = mixture.ranges(rows), examples.encoded.ranges()
    figures: list[DataSet] = []
    for set_index, source in enumerate(row_reading.sources(settings.data)):
        indices = example_ranges.get(set_index, range(0))
        figures.append(
            DataSet(
                path=source.path,
                weight=source.weight,
                rows=len(row_ranges.get(set_index, ())),
                tokens=sum(examples.encoded.sizes[indices.start : indices.stop]),
                held_out=len(examples.held_out_sets.get(set_index, ())),
                before=before.get(set_index),
                after=after.get(set_index),
            )
        )
    return figures


def fit_max_length(settings: Settings) -> Settings:
    """Reduce --max-length to the model's number of positions if --streaming hides the lengths of the texts."""
    if not settings.streaming:
        return settings
    try:
        model = models.empty_model(settings.model, settings.task)
    except PeftcoreError:  # a model with its own code; `check_positions` checks it after loading
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
    positions.check(model, max(examples.encoded.sizes) if settings.pack else examples.longest)
