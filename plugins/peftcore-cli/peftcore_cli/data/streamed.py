"""Streaming (`--streaming`): rows are tokenized when a batch needs them instead of before training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from peftcore.errors import PeftcoreError
from peftcore_cli.data.disk_list import LazySequence
from peftcore_cli.data.row import Row

Example = dict[str, Any]


class EncodedRows(LazySequence[Example]):
    """The first example of each row, tokenized when it is indexed.

    If a row has no token to learn within the maximum length, the next row that has one takes its place.

    Args:
        rows: the rows.
        encode: function from rows to examples. The result is empty if no token can be learned.
    """

    def __init__(self, rows: Sequence[Row], encode: Callable[[list[Row]], list[Example]]) -> None:
        self.rows, self.encode = rows, encode

    def __len__(self) -> int:
        return len(self.rows)

    def item(self, index: int) -> Example:
        """Tokenize a row."""
        for i in (*range(index, len(self)), *range(index)):
            examples = self.encode([self.rows[i]])
            if examples:
                return examples[0]
        raise PeftcoreError("no row has a token to learn within --max-length. Increase it")
