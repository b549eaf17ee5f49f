"""The first lines of data files, from which the task is inferred."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from peftcore.errors import PeftcoreError
from peftcore_cli.data import image_turns

_MAX_LINES = 100  # lines searched for images or audio


class FirstLines:
    """The fields of the first hundred lines of files, and the labels of all lines.

    Args:
        paths: the files, for messages.
        rows: fields of each line.

    Raises:
        PeftcoreError: there are no lines.
    """

    def __init__(self, paths: Sequence[str], rows: Iterator[Mapping[str, Any]]) -> None:
        self._remaining_rows = rows
        self.rows = list(itertools.islice(rows, _MAX_LINES))
        if not self.rows:
            raise PeftcoreError(f"'{', '.join(paths)}' has no examples. Add some, or pass other data")
        self.names = self.rows[0].keys()

    def have(self, *names: str) -> bool:
        """Return whether the first line has all of these fields."""
        return set(names) <= self.names

    @functools.cached_property
    def media(self) -> Mapping[str, Any] | None:
        """The first line with images or audio, or None."""
        return next((fields for fields in self.rows if image_turns.has_images(fields)), None)

    @property
    def are_labelled(self) -> bool:
        """Whether the first line has a label."""
        return not self.names.isdisjoint({"label", "labels"})

    @functools.cached_property
    def labels(self) -> list[Any]:
        """The labels of all lines. Reads the files to the end."""
        lines = itertools.chain(self.rows, self._remaining_rows)
        return [fields.get("label", fields.get("labels")) for fields in lines]
