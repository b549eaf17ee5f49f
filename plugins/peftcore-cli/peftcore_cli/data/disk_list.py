"""Lists on disk, so that the rows and encoded examples of a run do not have to fit into memory.

Items are pickled one by one. Columns of one type each, as in `datasets` and Arrow, do not fit rows whose fields differ
from line to line: text or a list of messages, or any columns for a reward function.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar, overload

from peftcore.errors import PeftcoreError

Item = TypeVar("Item")


class LazySequence(Sequence[Item]):
    """A sequence that creates an item when it is indexed. A slice is a list."""

    def item(self, index: int) -> Item:
        """Return the item at an index from 0."""
        raise NotImplementedError

    def size(self, index: int) -> int:
        """Return the size in bytes of an item on disk."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self.item(i) for i in range(len(self))[index]]
        return self.item(range(len(self))[index])

    def __iter__(self) -> Iterator[Item]:
        return map(self.item, range(len(self)))


def _write_error(error: OSError) -> PeftcoreError:
    return PeftcoreError(
        f"cannot write the examples to a temporary file: {error.strerror}. Free some space in the temporary folder, or "
        "set TMPDIR to another folder"
    )


class DiskList(LazySequence[Item]):
    """A list in a temporary file, which reads items when it is indexed.

    The file is in the folder `TMPDIR`. It has no name, so the system removes it when the process ends. An item takes 8
    bytes in memory.

    Args:
        items: the items.

    Raises:
        PeftcoreError: the file cannot be written, such as on a full disk.
    """

    def __init__(self, items: Iterable[Item] = ()) -> None:
        try:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  # closed when the list is deleted
        except OSError as error:
            raise _write_error(error) from error
        weakref.finalize(self, self._file.close)
        self._ends = array("q", [0])  # offsets: the start of the first item, then the end of each item
        self.extend(items)

    def extend(self, items: Iterable[Item]) -> None:
        """Append items.

        Raises:
            PeftcoreError: the file cannot be written, such as on a full disk.
        """
        for item in items:
            data = pickle.dumps(item, pickle.HIGHEST_PROTOCOL)
            self._write(data)
            self._ends.append(self._ends[-1] + len(data))
        self._write(b"", flush=True)

    def _write(self, data: bytes, *, flush: bool = False) -> None:
        try:
            self._file.write(data)
            if flush:
                self._file.flush()
        except OSError as error:
            raise _write_error(error) from error

    def __len__(self) -> int:
        return len(self._ends) - 1

    def size(self, index: int) -> int:
        """Return the size of an item in the file."""
        return self._ends[index + 1] - self._ends[index]

    def item(self, index: int) -> Item:
        """Read an item."""
        # `pread` does not move the file position, which forked data-loader workers share.
        data = os.pread(self._file.fileno(), self.size(index), self._ends[index])
        item: Item = pickle.loads(data)  # written by this process
        return item

    def __reduce__(self) -> Any:
        raise TypeError("a DiskList cannot be pickled")


class Selection(LazySequence[Item]):
    """A view of some items of a sequence.

    Args:
        items: the sequence.
        indices: indices of the items.
    """

    def __init__(self, items: LazySequence[Item], indices: Sequence[int]) -> None:
        self.items, self.indices = items, indices

    def __len__(self) -> int:
        return len(self.indices)

    def item(self, index: int) -> Item:
        """Return an item of the sequence."""
        return self.items[self.indices[index]]

    def size(self, index: int) -> int:
        """Return the size of an item of the sequence."""
        return self.items.size(self.indices[index])
