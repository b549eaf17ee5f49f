"""Matching of module and parameter names by suffixes, by regular expressions and by the keys of `rank_pattern`.

Regular expressions are matched in bounded time: a pattern may come from an untrusted file.

`re` cannot be interrupted, and `(a|ab?)*X` makes it try 2ⁿ ways on a path of n characters. The `regex` package, which
transformers requires, has a timeout. It matches patterns with repeats, branches or groups; `re` matches the rest, which
it can follow in one way only. `re` also compiles each pattern first, so syntax that only `regex` knows is refused.

A config may have thousands of patterns for a model of thousands of modules. `limited` bounds their total time.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

from peftcore.errors import PeftcoreError, nearest

_LENGTH = 100_000  # characters of a pattern: the names of all modules of a large model, one after the other
_COPIES = 100_000  # of a part of the pattern, that counted repeats such as {100} make of it when it is compiled
_SECONDS = 10.0  # of processor time for the patterns of one load; usual patterns of a large model take 0.3
_PATTERNS = 2_000  # different patterns of one load
_CHARACTERS = 500_000  # of all patterns of one load; compiling them takes 3 s

_BEFORE, _BEHIND = r"(?:.*\.)?(?:", ")"  # around the pattern of a path's end

FullMatch = Callable[[str], bool]


class _Budget:
    """Limits for all patterns of one load: processor time, number and length."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.characters = 0
        self.patterns = set[str]()

    def take(self, pattern: str) -> None:
        """Count a pattern. Raise a PeftcoreError if there are too many."""
        if pattern in self.patterns:
            return
        self.patterns.add(pattern)
        self.characters += len(pattern)
        if len(self.patterns) > _PATTERNS or self.characters > _CHARACTERS:
            raise PeftcoreError(
                f"the config has more than {_PATTERNS:,} regular expressions, or {_CHARACTERS:,} characters of them. "
                "Name modules by their paths"
            )

    def left(self) -> float:
        """Return the seconds that are left."""
        return max(_SECONDS - self.seconds, 1e-3)

    def spend(self, pattern: str, seconds: float) -> None:
        """Count the time that a pattern took. Raise a PeftcoreError if all patterns together took too long."""
        self.seconds += seconds
        if self.seconds > _SECONDS:
            raise PeftcoreError(
                f"the patterns of the config take more than {_SECONDS:g} s to match, the last of them "
                f"{_short(pattern)}. Write them more simply"
            )


_BUDGET: ContextVar[_Budget | None] = ContextVar("peftcore_patterns", default=None)


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Bound the total time of all patterns that are compiled inside the block; nested blocks share its limits.

    Raises:
        PeftcoreError: inside the block, if patterns take too long or are too many.
    """
    if _BUDGET.get() is not None:
        yield
        return
    token = _BUDGET.set(_Budget())
    try:
        yield
    finally:
        _BUDGET.reset(token)


def compiled_end(pattern: str, field: str) -> FullMatch:
    """Like `compiled`, for a pattern of the whole path or of its end after a dot."""
    return compiled(f"{_BEFORE}{pattern}{_BEHIND}", field)


def compiled(pattern: str, field: str) -> FullMatch:
    """Return a function that tests `re.compile(pattern).fullmatch` in bounded time.

    A pattern of the user's own call, outside of `limited`, is matched by `re` where `regex` is not installed.

    Args:
        pattern: a regular expression, which may come from an untrusted file.
        field: the config field, for messages.

    Raises:
        PeftcoreError: `pattern` is not a regular expression, or cannot be matched in bounded time.
    """
    budget = _BUDGET.get() or _Budget()
    budget.take(pattern)
    began = time.thread_time()
    try:
        matches, takes_timeout = _full_match(pattern)
    except (re.error, RecursionError, OverflowError, ValueError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise PeftcoreError(f"{field}={_short(pattern)} cannot be used as a regular expression: {what}") from None
    except ImportError:
        if _BUDGET.get() is not None:
            raise PeftcoreError(
                f"{field}={_short(pattern)} of a file is matched by the 'regex' package, which has a time limit and "
                "is not installed: pip install regex"
            ) from None
        matches, takes_timeout = re.compile(pattern).fullmatch, False

    budget.spend(pattern, time.thread_time() - began)

    def counted(text: str) -> bool:
        began = time.thread_time()
        try:
            found = matches(text, timeout=budget.left()) if takes_timeout else matches(text)
        except TimeoutError:
            budget.spend(pattern, math.inf)
            raise
        budget.spend(pattern, time.thread_time() - began)
        return found is not None

    return counted


@lru_cache(maxsize=1024)
def _full_match(pattern: str) -> tuple[Callable[..., Any], bool]:
    """Return the `fullmatch` of a pattern, and whether it takes a timeout.

    Raises:
        re.error: `pattern` is not a regular expression.
        ValueError: it takes too much to compile, or `re` and `regex` read it differently.
        ImportError: it needs `regex`, which is not installed.
    """
    if len(pattern) > _LENGTH:
        raise ValueError(f"it has {len(pattern):,} characters, at most {_LENGTH:,} are read")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of syntax that may change its meaning one day
        plain = re.compile(pattern)
    is_end = pattern.startswith(_BEFORE) and pattern.endswith(_BEHIND)
    if not set(pattern[len(_BEFORE) : -len(_BEHIND)] if is_end else pattern) & set("*+?{|("):
        return plain.fullmatch, False
    # What `regex` reads in another way: approximate matches, POSIX classes, and \B in a text without characters.
    differing = re.search(r"\{(?!\d+\}|\d*,\d*\})|\[:|\\B", pattern)
    if differing:
        raise ValueError(
            f"'{differing[0]}' at position {differing.start()} means something else in other libraries. Leave it out"
        )
    if math.prod(max(1, int(count)) for count in re.findall(r"\{(?:\d*,)?(\d+),?\}", pattern)) > _COPIES:
        raise ValueError(f"its counted repeats make more than {_COPIES:,} copies of a part")
    import regex

    try:
        return regex.compile(pattern).fullmatch, True
    except regex.error as error:
        raise ValueError(str(error)) from None


def _short(pattern: str) -> str:
    return repr(pattern) if len(pattern) <= 200 else f"{pattern[:200]!r}..."


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


def matches(pattern: str, path: str) -> bool:
    """Return whether a list entry matches `path`: the path itself, or its end after a dot."""
    return path == pattern or path.endswith(f".{pattern}")


def ends(path: str) -> list[str]:
    """Return the list entries that mean `path`, as `matches` has it: the path, and what follows each of its dots."""
    found = [path]
    while "." in path:
        path = path.partition(".")[2]
        found.append(path)
    return found


def is_inside(saved: str, path: str) -> bool:
    """Return whether `path` is, or is inside, a module that the entry `saved` of `modules_to_save` matches."""
    return f".{saved}." in f".{path}."


def excluded(names: Collection[str], patterns: str | Sequence[str] | None) -> set[str]:
    """Return those of `names`, of modules or parameters, that `exclude_modules` matches.

    Raises:
        PeftcoreError: a pattern matches nothing.
    """
    if not patterns:
        return set()
    if isinstance(patterns, str):
        found = set(filter(compiled(patterns, "exclude_modules"), names))
        if not found:
            raise PeftcoreError(f"exclude_modules={patterns!r} matches no module")
        return found
    for pattern in patterns:
        if not any(matches(pattern, path) for path in names):
            raise PeftcoreError(f"exclude_modules: '{pattern}' matches no module{nearest_path(pattern, names)}")
    return {path for path in names if any(matches(pattern, path) for pattern in patterns)}


def layer_indices(paths: Iterable[str], pattern: str | Sequence[str] | None) -> dict[str, int | None]:
    """Return the layer index of each path by `layers_pattern`: the first number after a list of layers."""
    names = [pattern] if isinstance(pattern, str) else list(pattern or ())
    lists: list[FullMatch] = [compiled_end(name, "layers_pattern") for name in names] or [lambda _: True]

    def index(path: str) -> int | None:
        parts = path.split(".")
        numbers = [i for i, part in enumerate(parts[:-1]) if i and part.isdecimal()]
        return next((int(parts[i]) for is_list in lists for i in numbers if is_list(".".join(parts[:i]))), None)

    return {path: index(path) for path in paths}


def nearest_path(pattern: str, paths: Iterable[str]) -> str:
    """Return the nearest names, or those that exist, for messages."""
    names = {part for path in paths for part in (path, path.rpartition(".")[2]) if part and not part.isdigit()}
    return (
        nearest(pattern, sorted(names))
        or f". Names here: {', '.join(sorted(names - {p for p in names if '.' in p})[:12])}"
    )


def shortest_suffixes(chosen: Collection[str], others: Collection[str], parts: int = 1) -> list[str]:
    """Return the shortest list of suffixes, each of at least `parts` parts, that matches `chosen` and not `others`."""
    of_others: set[str] = set()
    for path in others:
        of_others.update(ends(path))
    suffixes: set[str] = set()
    for path in sorted(chosen):
        for suffix in ends(path)[::-1][max(0, min(parts, path.count(".") + 1) - 1) :]:  # the shortest first
            if suffix not in of_others:
                suffixes.add(suffix)
                break
        else:
            raise PeftcoreError(f"no suffix selects '{path}' alone. Give target_modules as a regular expression")
    return sorted([suffix for suffix in suffixes if suffixes.isdisjoint(ends(suffix)[1:])])
