"""The examples of a run: read them, split them into training and held-out examples, and encode each data set."""

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


_CHUNK = 100  # rows encoded at once; with 1,000, tokenizers takes 40 % more processor time per row
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

    Attributes:
        examples: the examples, sorted by data set.
        sizes: number of tokens of each example.
        counts: number of examples of each data set, by its index.
    """

    examples: DiskList[Example]
    sizes: array[int]
    counts: dict[int, int]

    def ranges(self) -> dict[int, range]:
        """Return the indices of the examples of each data set."""
        ends = itertools.accumulate(self.counts.values())
        return {source: range(end - self.counts[source], end) for source, end in zip(self.counts, ends, strict=True)}

    def by_set(self) -> dict[int, Sequence[Example]]:
        """Return the examples of each data set."""
        return {source: Selection(self.examples, indices) for source, indices in self.ranges().items()}


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Encoded examples of a run.

    Attributes:
        encoded: training examples before packing; with --streaming, the first `FIRST_ROWS` of them.
        rows: examples to train on, packed with --pack; with --streaming, the first `FIRST_ROWS` of them.
        dataset: the trainer's dataset: `rows`, or with --streaming all rows.
        weighted_sizes: (number of examples, weight) of each data set in `dataset`.
        sizes: number of tokens of each example in `dataset`; with --streaming, the size of its row in bytes.
        longest: maximum number of tokens of an example.
        held_out: examples for evaluation.
        held_out_sets: held-out examples by the index of their data set; empty for a single data set.
        validation: examples set aside to choose among runs.
        other: examples from another domain.
        is_mixed: whether there are several data sets.
    """

    encoded: EncodedSets
    rows: Sequence[Example]
    dataset: Sequence[Example]
    weighted_sizes: list[tuple[int, float]]
    sizes: Sequence[int]
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
    task = registered.find(settings.task)
    task.check_rows(rows.train)
    train = rows.train[:FIRST_ROWS] if settings.streaming else rows.train
    encoded = encode_sets("first" if settings.streaming else "training", train, settings, tokenizer, labels)
    held_out = encode_sets("held-out", rows.held_out, settings, tokenizer, labels)
    validation = encode_sets("validation", rows.validation, settings, tokenizer, labels).examples
    other = encode_sets("other", other_rows(settings), settings, tokenizer, labels).examples
    is_mixed = len(row_reading.sources(settings.data)) > 1 and not settings.streaming
    # Held-out examples of other files cannot be attributed to data sets.
    held_out_sets = held_out.by_set() if is_mixed and settings.eval_data is None else {}
    rows_to_train, sizes, weighted_sizes = training_rows(encoded, settings)
    dataset, longest = rows_to_train, max(sizes)
    if settings.streaming:

        def encode_some(some_rows: list[Row]) -> list[Example]:
            return task.encode(some_rows, tokenizer, settings.max_length, labels, may_be_empty=True).examples

        dataset, longest = streamed.EncodedRows(rows.train, encode_some), settings.max_length
        sizes = array("I", map(rows.train.size, range(len(dataset))))
        counts = {source: len(indices) for source, indices in mixture.ranges(rows.train).items()}
        weighted_sizes = weigh(counts, settings)
        say(f"streaming {number(len(dataset), 'row')}; texts are truncated at {longest} tokens")
    return Examples(
        encoded=encoded,
        rows=rows_to_train,
        dataset=dataset,
        weighted_sizes=weighted_sizes,
        sizes=sizes,
        longest=longest,
        held_out=held_out.examples,
        held_out_sets=held_out_sets,
        validation=validation,
        other=other,
        is_mixed=is_mixed,
    )


def other_rows(settings: Settings) -> list[Row]:
    """Return the texts of --other-data, whose loss measures forgetting; an empty list without --other-data."""
    return [] if settings.other_data is None else row_reading.read_rows(settings.other_data, settings.task)


def encode_sets(
    label: str, rows: Sequence[Row], settings: Settings, tokenizer: Any, labels: tuple[str, ...]
) -> EncodedSets:
    """Encode rows in chunks. `label` describes the rows in warnings."""
    task = registered.find(settings.task)
    examples, sizes, counts = DiskList[Example](), array("I"), dict[int, int]()
    truncated_count = left_out = 0
    for source, group in itertools.groupby(rows, key=lambda row: row.source):
        counts[source] = 0
        while chunk := list(itertools.islice(group, _CHUNK)):
            encoded = task.encode(chunk, tokenizer, settings.max_length, labels, may_be_empty=True)
            examples.extend(encoded.examples)
            sizes.extend(task.lengths(encoded.examples))
            counts[source] += len(encoded.examples)
            truncated_count += encoded.truncated
            left_out += encoded.left_out
            last_chunk = chunk
        if not counts[source]:
            task.encode(last_chunk, tokenizer, settings.max_length, labels)  # raises the error of an empty result
    if truncated_count:
        warn(
            f"{truncated_count:,} of {len(rows):,} {label} examples were truncated or split, because they are longer "
            f"than {settings.max_length} tokens (--max-length)"
        )
    if left_out:
        warn(f"{left_out:,} {label} examples were dropped, because they have no token to learn within --max-length")
    return EncodedSets(examples, sizes, counts)


def weigh(counts: Mapping[int, int], settings: Settings) -> list[tuple[int, float]]:
    """Return (number of examples, weight) for each data set, or for all together if all weights are equal."""
    weights = [source.weight for source in row_reading.sources(settings.data)]
    if len(set(weights)) == 1:
        return [(sum(counts.values()), weights[0])]
    return [(count, weights[source]) for source, count in counts.items()]


def training_rows(
    encoded: EncodedSets, settings: Settings
) -> tuple[Sequence[Example], Sequence[int], list[tuple[int, float]]]:
    """Return the rows to train on, their numbers of tokens, and (number of rows, weight) for each data set.

    Packed rows mix data sets only if all weights are equal.
    """
    weighted_sizes = weigh(encoded.counts, settings)
    if not settings.pack:
        return encoded.examples, encoded.sizes, weighted_sizes
    rows = list[list[int]]()  # indices of the examples in each packed row
    packed_sizes = list[tuple[int, float]]()
    begin = 0
    for count, weight in weighted_sizes:
        packed_rows = packing.pack(encoded.sizes[begin : begin + count], settings.max_length)
        for packed_row in packed_rows:
            rows.append([begin + i for i in packed_row])
        packed_sizes.append((len(packed_rows), weight))
        begin += count
    summary = f"{number(len(encoded.examples), 'example')} into {number(len(rows), 'row')}"
    say(f"packed {summary} of at most {settings.max_length} tokens")
    sizes = [sum(encoded.sizes[i] for i in row) for row in rows]
    return packing.PackedRows(encoded.examples, rows), sizes, packed_sizes


def rows_per_epoch(weighted_sizes: Sequence[tuple[int, float]]) -> int:
    """Return the number of rows per epoch."""
    return sum(mixture.count(size, weight) for size, weight in weighted_sizes)


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
    rows_by_set, ranges, data_sets = mixture.ranges(rows), examples.encoded.ranges(), []
    for i, source in enumerate(row_reading.sources(settings.data)):
        indices = ranges.get(i, range(0))
        tokens = sum(examples.encoded.sizes[indices.start : indices.stop])
        held_out = len(examples.held_out_sets.get(i, []))
        count = len(rows_by_set.get(i, ()))
        data_sets.append(DataSet(source.path, source.weight, count, tokens, held_out, before.get(i), after.get(i)))
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
    positions.check(model, max(examples.encoded.sizes) if settings.pack else examples.longest)
