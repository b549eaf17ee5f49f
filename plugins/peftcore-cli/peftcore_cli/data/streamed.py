"""Examples that stay in their files (`--streaming`): lines of JSONL files, read and tokenized when a batch needs them.

One pass over the files notes where each line begins, in 12 bytes per line, so any line can be read. Lines are drawn in
blocks of neighbours, which disks read quickly: blocks in random order, and the lines of several blocks at random. The
order depends on the seed and the epoch alone, so a run resumes at the same line, and ranks take batches of one order.
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
from peftcore_cli.data.data_files import checked, object_of, renamed
from peftcore_cli.data.row import Row
from peftcore_cli.tasks import registered

_BLOCK = 1_000  # neighbouring lines
_TOGETHER = 16  # blocks whose lines are drawn at random
_BATCHES = 50  # batches drawn together, then sorted by length

Example = dict[str, Any]


def files_of(paths: Sequence[str]) -> list[Path]:
    """Return the files of `--data`, those of a folder in alphabetical order.

    Raises:
        PeftcoreError: there is none, or one is not of lines.
    """
    found: list[Path] = []
    for source in row_reading.sources(paths):
        if source.weight != 1:
            raise PeftcoreError(
                f"--streaming draws every line once per epoch, found --data {source.path}:{source.weight:g}. "
                "Leave out the weight"
            )
        path = Path(os.path.expanduser(source.path))
        some = sorted(each for each in path.iterdir() if each.suffix == ".jsonl") if path.is_dir() else [path]
        if not some or some[0].suffix.lower() != ".jsonl":
            raise PeftcoreError(
                f"--streaming reads lines of .jsonl files, found '{source.path}'. Convert it, or leave out --streaming"
            )
        missing = next((each for each in some if not each.is_file()), None)
        if missing is not None:
            raise PeftcoreError(f"the file '{missing}' does not exist. Pass .jsonl files or folders of them")
        found += some
    return found


class Lines:
    """The rows of JSONL files, read one by one.

    Args:
        paths: values of `--data`.
        task: the task.
        columns: {our field name: the files'}.

    Raises:
        PeftcoreError: a file is missing, of another kind or empty.
    """

    def __init__(self, paths: Sequence[str], task: str, columns: Mapping[str, str] | None) -> None:
        self.files, self.task, self.columns = files_of(paths), registered.find(task), columns
        self.begins, self.sizes = array("q"), array("I")
        self.ends: list[int] = []  # number of rows up to and including each file
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
            PeftcoreError: the line is not an example of the task; the message names the file and the line.
        """
        which = bisect.bisect_right(self.ends, index)
        where = str(self.files[which])
        with open(where, "rb") as file:
            file.seek(self.begins[index])
            line = file.read(self.sizes[index])
        try:
            return self._parsed(where, line)
        except PeftcoreError as error:
            numbered = f"{where}:{self._number(which, index)}"
            raise PeftcoreError(str(error).replace(where, numbered, 1)) from error

    def _parsed(self, where: str, line: bytes) -> Row:
        try:
            text = line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise PeftcoreError(f"{where}: not UTF-8 text: {error.reason} at byte {error.start}") from error
        where, fields = renamed(checked(object_of(where, text)), self.columns or {})
        return row_reading.row_of(where, fields, self.task)

    def _number(self, which: int, index: int) -> int:
        """Return the number of a line in its file, from 1."""
        with open(self.files[which], "rb") as file:
            return file.read(self.begins[index]).count(b"\n") + 1


class EncodedLines(Dataset[Example]):
    """Examples of lines, tokenized when they are asked for.

    A line without a token to learn within the maximum length is left out: the next one that has some takes its place.

    Args:
        lines: the rows.
        encode: (rows) -> examples, of which the first is used; none if there is nothing to learn.
        held_out: indices of rows that are not among the examples.
    """

    def __init__(
        self, lines: Lines, encode: Callable[[list[Row]], list[Example]], held_out: Sequence[int] = ()
    ) -> None:
        self.lines, self.encode = lines, encode
        self.before = [index - i for i, index in enumerate(sorted(held_out))]  # examples before each held-out line

    def __len__(self) -> int:
        return len(self.lines) - len(self.before)

    def index(self, place: int) -> int:
        """Return the line of an example."""
        return place + bisect.bisect_right(self.before, place)

    def size(self, place: int) -> int:
        """Return the bytes of an example's line, in place of its number of tokens."""
        return self.lines.sizes[self.index(place)]

    def __getitem__(self, place: int) -> Example:
        for further in range(len(self)):
            found = self.encode([self.lines[self.index((place + further) % len(self))]])
            if found:
                return found[0]
        raise PeftcoreError("no line has a token to learn within --max-length. Increase it")


class BlockSampler(Sampler[int]):
    """Yields all places of a dataset, block by block, so that the order needs little memory.

    Args:
        examples: the dataset.
        batch_size: the data loader's.
        seed: of the order.
    """

    def __init__(self, examples: EncodedLines, batch_size: int, seed: int) -> None:
        self.examples, self.batch_size, self.seed, self.epoch = examples, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; called by the data loader."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed} {self.epoch}")
        blocks = list(range(0, len(self.examples), _BLOCK))
        draw.shuffle(blocks)
        rest: list[int] = []
        for start in range(0, len(blocks), _TOGETHER):
            some = [
                place
                for begin in blocks[start : start + _TOGETHER]
                for place in range(begin, min(begin + _BLOCK, len(self.examples)))
            ]
            draw.shuffle(some)
            some = rest + some
            full = len(some) - len(some) % self.batch_size
            yield from self._batches(some[:full], draw)
            rest = some[full:]
        yield from rest

    def _batches(self, places: list[int], draw: random.Random) -> Iterator[int]:
        """Yield batches of similar lengths, in random order."""
        many = _BATCHES * self.batch_size
        for start in range(0, len(places), many):
            drawn = sorted(places[start : start + many], key=self.examples.size)
            batches = [drawn[i : i + self.batch_size] for i in range(0, len(drawn), self.batch_size)]
            draw.shuffle(batches)
            for batch in batches:
                yield from batch


def chosen(lines: Lines, count: int, seed: int) -> list[int]:
    """Return which lines are held out.

    Raises:
        PeftcoreError: nothing would be left.
    """
    if count >= len(lines):
        raise PeftcoreError(
            f"--holdout {count} leaves nothing to train on: there are {len(lines):,} lines. Hold out fewer"
        )
    return sorted(random.Random(seed).sample(range(len(lines)), count))
