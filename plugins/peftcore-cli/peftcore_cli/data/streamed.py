"""Streaming (`--streaming`): read and tokenize lines of JSONL files when a batch needs them.

A first pass over the files stores the offset and size of each line (12 bytes per line), for random access. To keep disk
reads sequential, blocks of consecutive lines are shuffled, and then the lines within several blocks. The order depends
only on the seed and the epoch, so a run resumes at the same line, and all ranks see the same order.
"""

from __future__ import annotations

import bisect
import os
import random
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, Sampler

from peftcore.errors import PeftcoreError
from peftcore_cli.data import row_reading
from peftcore_cli.data.data_files import check_header, object_of, rename_columns
from peftcore_cli.data.row import Row
from peftcore_cli.tasks import registered

_BLOCK = 1_000  # consecutive lines
_BLOCKS = 16  # blocks whose lines are shuffled together
_BATCHES = 50  # batches whose examples are sorted by length together

Example = dict[str, Any]


def files_of(paths: Sequence[str]) -> list[Path]:
    """Return the files of `--data`. The files in a folder are sorted by name.

    Raises:
        PeftcoreError: there are no files, or one of them is not a .jsonl file.
    """
    files: list[Path] = []
    for source in row_reading.sources(paths):
        if source.weight != 1:
            raise PeftcoreError(
                "--streaming uses every line once per epoch, so data sets cannot be weighted, found --data "
                f"{source.path}:{source.weight:g}. Remove the weight"
            )
        path = Path(os.path.expanduser(source.path))
        group = sorted(file for file in path.iterdir() if file.suffix == ".jsonl") if path.is_dir() else [path]
        if not group or group[0].suffix.lower() != ".jsonl":
            raise PeftcoreError(
                f"--streaming only reads .jsonl files, found '{source.path}'. Convert it, or remove --streaming"
            )
        missing = next((file for file in group if not file.is_file()), None)
        if missing is not None:
            raise PeftcoreError(f"the file '{missing}' does not exist. Pass a .jsonl file, or a folder of .jsonl files")
        files += group
    return files


class Lines:
    """The rows of JSONL files, read on demand.

    Args:
        paths: values of `--data`.
        task: the task.
        columns: {field: column of the files}.

    Raises:
        PeftcoreError: a file is missing or empty, or is not a .jsonl file.
    """

    def __init__(self, paths: Sequence[str], task: str, columns: Mapping[str, str] | None) -> None:
        self.files, self.task, self.columns = files_of(paths), registered.find(task), columns
        self.begins, self.sizes = array("q"), array("I")
        self.ends: list[int] = []  # cumulative number of rows at the end of each file
        for file in self.files:
            self._index(file)
        if not self.begins:
            raise PeftcoreError(f"'{self.files[0]}' has no examples")

    def _index(self, file: Path) -> None:
        place = 0
        with open(file, "rb") as lines:
            for line in lines:
                if line.strip():
                    self.begins.append(place)
                    self.sizes.append(len(line))
                place += len(line)
        self.ends.append(len(self.begins))

    def __len__(self) -> int:
        return len(self.begins)

    def __getitem__(self, index: int) -> Row:
        """Return a row.

        Raises:
            PeftcoreError: the line is not an example of the task. The message names the file and the line.
        """
        which = bisect.bisect_right(self.ends, index)
        where = str(self.files[which])
        with open(where, "rb") as file:
            file.seek(self.begins[index])
            line = file.read(self.sizes[index])
        try:
            return self._parse(where, line)
        except PeftcoreError as error:
            numbered = f"{where}:{self._number(which, index)}"
            raise PeftcoreError(str(error).replace(where, numbered, 1)) from error

    def _parse(self, where: str, line: bytes) -> Row:
        try:
            text = line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise PeftcoreError(
                f"{where}: the line is not valid UTF-8: {error.reason} at byte {error.start}. Save the file as UTF-8"
            ) from error
        where, fields = rename_columns(check_header(object_of(where, text)), self.columns or {})
        return row_reading.row_of(where, fields, self.task)

    def _number(self, which: int, index: int) -> int:
        """Return the 1-based number of a line in its file."""
        with open(self.files[which], "rb") as file:
            return file.read(self.begins[index]).count(b"\n") + 1


class EncodedLines(Dataset[Example]):
    """Examples tokenized on demand, one per line.

    If a line has no token to learn within the maximum length, the next line that has one takes its place.

    Args:
        lines: the rows.
        encode: (rows) -> examples. Only the first example is used. The list is empty if the row has no token to learn.
        held_out: indices of rows to exclude.
    """

    def __init__(
        self, lines: Lines, encode: Callable[[list[Row]], list[Example]], held_out: Sequence[int] = ()
    ) -> None:
        self.lines, self.encode = lines, encode
        self.before = [index - i for i, index in enumerate(sorted(held_out))]  # examples before each held-out line

    def __len__(self) -> int:
        return len(self.lines) - len(self.before)

    def index(self, place: int) -> int:
        """Return the index of an example's line."""
        return place + bisect.bisect_right(self.before, place)

    def size(self, place: int) -> int:
        """Return the size of an example's line in bytes, a proxy for its number of tokens."""
        return self.lines.sizes[self.index(place)]

    def __getitem__(self, place: int) -> Example:
        for step in range(len(self)):
            examples = self.encode([self.lines[self.index((place + step) % len(self))]])
            if examples:
                return examples[0]
        raise PeftcoreError("no line has a token to learn within --max-length. Increase --max-length")


class BlockSampler(Sampler[int]):
    """Yields all indices of a dataset block by block, so that no permutation of all indices is kept in memory.

    Args:
        examples: the dataset.
        batch_size: batch size of the data loader.
        seed: random seed of the order.
    """

    def __init__(self, examples: EncodedLines, batch_size: int, seed: int) -> None:
        self.examples, self.batch_size, self.seed, self.epoch = examples, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; called by the data loader."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[int]:
        generator = random.Random(f"{self.seed} {self.epoch}")
        blocks = list(range(0, len(self.examples), _BLOCK))
        generator.shuffle(blocks)
        leftover: list[int] = []
        for start in range(0, len(blocks), _BLOCKS):
            places = [
                place
                for begin in blocks[start : start + _BLOCKS]
                for place in range(begin, min(begin + _BLOCK, len(self.examples)))
            ]
            generator.shuffle(places)
            places = leftover + places
            full = len(places) - len(places) % self.batch_size
            yield from self._batches(places[:full], generator)
            leftover = places[full:]
        yield from leftover

    def _batches(self, places: list[int], generator: random.Random) -> Iterator[int]:
        """Yield batches of similar lengths, in random order."""
        group_size = _BATCHES * self.batch_size
        for start in range(0, len(places), group_size):
            group = sorted(places[start : start + group_size], key=self.examples.size)
            batches = [group[i : i + self.batch_size] for i in range(0, len(group), self.batch_size)]
            generator.shuffle(batches)
            for batch in batches:
                yield from batch


def choose_held_out(lines: Lines, count: int, seed: int) -> list[int]:
    """Return the indices of the lines to hold out.

    Raises:
        PeftcoreError: no line would be left to train on.
    """
    if count >= len(lines):
        raise PeftcoreError(
            f"--holdout {count} leaves no lines to train on: the files have {len(lines):,}. Hold out fewer"
        )
    return sorted(random.Random(seed).sample(range(len(lines)), count))
