"""Values by module, as `rank_pattern` and `alpha_pattern` give them: the first key that matches a path decides."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from peftcore.errors import PeftcoreError
from peftcore.targets.patterns import compiled_end

_PLAIN = re.compile(r"[\w.]+", re.ASCII)
_EXPRESSIONS = 1_000  # among the keys of a pattern; others are plain names


def pattern_value(patterns: dict[str, Any] | None, path: str, default: Any) -> Any:
    """Return the value of the first key of a `rank_pattern` or `alpha_pattern` that matches `path`.

    Raises:
        PeftcoreError: too many keys are regular expressions, or one cannot be matched.
    """
    if not patterns:
        return default
    key = _keys(tuple(patterns)).first(path)
    return default if key is None else patterns[key]


def matched_keys(patterns: Iterable[str], paths: Iterable[str]) -> set[str]:
    """Return the keys of a `rank_pattern` or `alpha_pattern` that match one of `paths`, whichever comes first.

    Raises:
        PeftcoreError: too many keys are regular expressions, or one cannot be matched.
    """
    keys = _keys(tuple(patterns))
    return keys.matched(list(paths)) if keys.keys else set()


class _Keys:
    """The keys of a pattern, with a lookup whose time depends on their kinds rather than their number.

    A plain key of names and dots matches the end of a path, with a dot matching any character. Keys whose names have
    the same lengths are in one table.
    """

    def __init__(self, keys: tuple[str, ...]) -> None:
        self.keys = keys
        self.tables: dict[tuple[int, ...], dict[tuple[str, ...], int]] = {}
        self.expressions: list[int] = []
        for position, key in enumerate(keys):
            if _PLAIN.fullmatch(key):
                names = tuple(key.split("."))
                self.tables.setdefault(tuple(map(len, names)), {}).setdefault(names, position)
            else:
                self.expressions.append(position)
        if len(self.expressions) > _EXPRESSIONS:
            raise PeftcoreError(
                f"rank_pattern or alpha_pattern has {len(self.expressions):,} regular expressions, at most "
                f"{_EXPRESSIONS:,} are read. Name modules by their paths"
            )

    def first(self, path: str) -> str | None:
        """Return the first key that matches `path`, or None."""
        found = min(self._plain(path), default=len(self.keys))
        for position in self.expressions:
            if position > found:
                break
            if self._expression(position)(path):
                return self.keys[position]
        return self.keys[found] if found < len(self.keys) else None

    def matched(self, paths: Sequence[str]) -> set[str]:
        """Return all keys that match one of `paths`."""
        found = {position for path in paths for position in self._plain(path)}
        found |= {position for position in self.expressions if any(map(self._expression(position), paths))}
        return {self.keys[position] for position in found}

    def _plain(self, path: str) -> Iterator[int]:
        """Yield the positions of the plain keys that match `path`."""
        for lengths, table in self.tables.items():
            begin = len(path) - sum(lengths) - len(lengths) + 1
            if begin < 0 or (begin and path[begin - 1] != "."):
                continue
            names = []
            for length in lengths:
                names.append(path[begin : begin + length])
                begin += length + 1
            position = table.get(tuple(names))
            if position is not None:
                yield position

    def _expression(self, position: int) -> Callable[[str], bool]:
        return compiled_end(self.keys[position], "rank_pattern or alpha_pattern")


@lru_cache(maxsize=64)
def _keys(keys: tuple[str, ...]) -> _Keys:
    return _Keys(keys)
