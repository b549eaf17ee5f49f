"""Match module and parameter names by suffixes, by regular expressions and by the keys of `rank_pattern`.

Regular expressions are matched in bounded time, since a pattern may come from an untrusted file. `re` cannot be
interrupted, and for `(a|ab?)*X` it tries 2ⁿ alternatives on a path of n characters. The `regex` package, which
transformers requires, has a timeout, so it matches patterns with repeats, branches or groups. `re` matches all other
patterns, which need no backtracking, and first compiles every pattern, to reject syntax that only `regex` supports.

A config may have thousands of patterns for a model of thousands of modules. `limit_matching_time` bounds their total
time.
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

# Limits for one pattern: its length (enough for the names of all modules of a large model), and the copies that counted
# repeats such as {100} make of a part when it is compiled.
_LENGTH = 100_000
_COPIES = 100_000
# Limits for all patterns of one load: processor time (the patterns of a large model take 0.3 s), number of different
# patterns, and total length (compiling that much takes 3 s).
_SECONDS = 10.0
_PATTERNS = 2_000
_CHARACTERS = 500_000

_BEFORE, _BEHIND = r"(?:.*\.)?(?:", ")"  # make a pattern match at the end of a path

FullMatch = Callable[[str], bool]


class _Budget:
    """Time and number of patterns used so far within one `limit_matching_time` block."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.characters = 0
        self.patterns = set[str]()

    def take(self, pattern: str) -> None:
        """Count a pattern; raise a PeftcoreError if there are too many."""
        if pattern in self.patterns:
            return
        self.patterns.add(pattern)
        self.characters += len(pattern)
        if len(self.patterns) > _PATTERNS or self.characters > _CHARACTERS:
            raise PeftcoreError(
                f"the config contains too many regular expressions: at most {_PATTERNS:,}, with {_CHARACTERS:,} "
                "characters in all, are supported. Name modules by their paths"
            )

    def left(self) -> float:
        """Return the remaining seconds, at least 0.001."""
        return max(_SECONDS - self.seconds, 1e-3)

    def spend(self, pattern: str, seconds: float) -> None:
        """Add the time that a pattern took; raise a PeftcoreError if all patterns together took too long."""
        self.seconds += seconds
        if self.seconds > _SECONDS:
            raise PeftcoreError(
                f"matching the config's patterns takes more than {_SECONDS:g} s (the last pattern was "
                f"{_short(pattern)}). Simplify the patterns"
            )


_BUDGET: ContextVar[_Budget | None] = ContextVar("peftcore_patterns", default=None)


@contextlib.contextmanager
def limit_matching_time() -> Iterator[None]:
    """Limit the total matching time of all patterns compiled in the block; nested blocks share the limits.

    Raises:
        PeftcoreError: the block contains too many patterns, or they take too long.
    """
    if _BUDGET.get() is not None:
        yield
        return
    token = _BUDGET.set(_Budget())
    try:
        yield
    finally:
        _BUDGET.reset(token)


def compile_suffix_pattern(pattern: str, field: str) -> FullMatch:
    """Like `compile_pattern`, for a pattern that matches a full path or its end after a dot."""
    return compile_pattern(f"{_BEFORE}{pattern}{_BEHIND}", field)


def compile_pattern(pattern: str, field: str) -> FullMatch:
    """Return a function that tests `re.compile(pattern).fullmatch` in bounded time.

    Outside `limit_matching_time`, patterns come from the user, and `re` matches them if `regex` is not installed.

    Args:
        pattern: a regular expression, which may come from an untrusted file.
        field: name of the config field, for error messages.

    Raises:
        PeftcoreError: `pattern` is not a regular expression, or cannot be matched in bounded time.
    """
    budget = _BUDGET.get() or _Budget()
    budget.take(pattern)
    began = time.thread_time()
    try:
        matches, takes_timeout = _full_match(pattern)
    except (re.error, RecursionError, OverflowError, ValueError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise PeftcoreError(f"{field}={_short(pattern)} cannot be used as a regular expression: {problem}") from None
    except ImportError:
        if _BUDGET.get() is not None:
            raise PeftcoreError(
                f"{field}={_short(pattern)} comes from a file, so it is only matched with a time limit, which needs "
                "the 'regex' package. Install it: pip install regex"
            ) from None
        matches, takes_timeout = re.compile(pattern).fullmatch, False

    budget.spend(pattern, time.thread_time() - began)

    def counted(text: str) -> bool:
        began = time.thread_time()
        try:
            match = matches(text, timeout=budget.left()) if takes_timeout else matches(text)
        except TimeoutError:
            budget.spend(pattern, math.inf)
            raise
        budget.spend(pattern, time.thread_time() - began)
        return match is not None

    return counted


@lru_cache(maxsize=1024)
def _full_match(pattern: str) -> tuple[Callable[..., Any], bool]:
    """Return the `fullmatch` function of a pattern, and whether it takes a timeout.

    Raises:
        re.error: `pattern` is not a regular expression.
        ValueError: the pattern is too large to compile, or `re` and `regex` interpret it differently.
        ImportError: the pattern needs `regex`, which is not installed.
    """
    if len(pattern) > _LENGTH:
        raise ValueError(f"it has {len(pattern):,} characters, but at most {_LENGTH:,} are supported")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FutureWarning about syntax that may change its meaning
        plain = re.compile(pattern)
    is_end = pattern.startswith(_BEFORE) and pattern.endswith(_BEHIND)
    if not set(pattern[len(_BEFORE) : -len(_BEHIND)] if is_end else pattern) & set("*+?{|("):
        return plain.fullmatch, False
    # `regex` interprets these differently: approximate matches, POSIX classes, and \B in an empty text.
    differing = re.search(r"\{(?!\d+\}|\d*,\d*\})|\[:|\\B", pattern)
    if differing:
        raise ValueError(
            f"'{differing[0]}' at position {differing.start()} has another meaning in other libraries. Leave it out"
        )
    if math.prod(max(1, int(count)) for count in re.findall(r"\{(?:\d*,)?(\d+),?\}", pattern)) > _COPIES:
        raise ValueError(f"its counted repeats expand to more than {_COPIES:,} copies")
    import regex

    try:
        return regex.compile(pattern).fullmatch, True
    except regex.error as error:
        raise ValueError(str(error)) from None


def _short(pattern: str) -> str:
    return repr(pattern) if len(pattern) <= 200 else f"{pattern[:200]!r}..."


_PLAIN = re.compile(r"[\w.]+", re.ASCII)

_EXPRESSIONS = 1_000  # maximum number of keys that are regular expressions rather than plain names


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
    """Return all keys of a `rank_pattern` or `alpha_pattern` that match one of `paths`.

    Raises:
        PeftcoreError: too many keys are regular expressions, or one cannot be matched.
    """
    keys = _keys(tuple(patterns))
    return keys.matched(list(paths)) if keys.keys else set()


class _Keys:
    """Keys of a `rank_pattern`, looked up in a time that does not grow with the number of plain keys.

    A plain key (names and dots) matches the end of a path, where a dot matches any character. Keys with names of the
    same lengths share a table.
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
                f"rank_pattern or alpha_pattern has {len(self.expressions):,} regular expressions, but at most "
                f"{_EXPRESSIONS:,} are supported. Name modules by their paths"
            )

    def first(self, path: str) -> str | None:
        """Return the first key that matches `path`, or None."""
        position_of_plain = min(self._plain(path), default=len(self.keys))
        for position in self.expressions:
            if position > position_of_plain:
                break
            if self._expression(position)(path):
                return self.keys[position]
        return self.keys[position_of_plain] if position_of_plain < len(self.keys) else None

    def matched(self, paths: Sequence[str]) -> set[str]:
        """Return all keys that match one of `paths`."""
        positions = {position for path in paths for position in self._plain(path)}
        positions |= {position for position in self.expressions if any(map(self._expression(position), paths))}
        return {self.keys[position] for position in positions}

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
        return compile_suffix_pattern(self.keys[position], "rank_pattern or alpha_pattern")


@lru_cache(maxsize=64)
def _keys(keys: tuple[str, ...]) -> _Keys:
    return _Keys(keys)


def matches(pattern: str, path: str) -> bool:
    """Return whether `pattern`, an entry of a list, equals `path` or its end after a dot."""
    return path == pattern or path.endswith(f".{pattern}")


def path_suffixes(path: str) -> list[str]:
    """Return all list entries that match `path` (see `matches`): the path itself, and its rest after each dot."""
    suffixes = [path]
    while "." in path:
        path = path.partition(".")[2]
        suffixes.append(path)
    return suffixes


def is_inside(entry: str, path: str) -> bool:
    """Return whether `path` is in a module (or is the module) that an entry of `modules_to_save` matches."""
    return f".{entry}." in f".{path}."


def excluded(names: Collection[str], patterns: str | Sequence[str] | None) -> set[str]:
    """Return the names of modules and parameters that `exclude_modules` matches.

    Raises:
        PeftcoreError: a pattern does not match anything.
    """
    if not patterns:
        return set()
    if isinstance(patterns, str):
        excluded_names = set(filter(compile_pattern(patterns, "exclude_modules"), names))
        if not excluded_names:
            example = next(iter(names), "layers.0")
            raise PeftcoreError(
                f"exclude_modules={patterns!r} matches no module. The regular expression must match a full path, such "
                f"as '{example}'"
            )
        return excluded_names
    for pattern in patterns:
        if not any(matches(pattern, path) for path in names):
            raise PeftcoreError(f"exclude_modules: '{pattern}' matches no module{suggest_paths(pattern, names)}")
    return {path for path in names if any(matches(pattern, path) for pattern in patterns)}


def layer_indices(paths: Iterable[str], pattern: str | Sequence[str] | None) -> dict[str, int | None]:
    """Return {path: layer index}: the first number after a list of layers named in `layers_pattern`."""
    names = [pattern] if isinstance(pattern, str) else list(pattern or ())
    lists: list[FullMatch] = [compile_suffix_pattern(name, "layers_pattern") for name in names] or [lambda _: True]

    def index(path: str) -> int | None:
        parts = path.split(".")
        numbers = [i for i, part in enumerate(parts[:-1]) if i and part.isdecimal()]
        return next((int(parts[i]) for is_list in lists for i in numbers if is_list(".".join(parts[:i]))), None)

    return {path: index(path) for path in paths}


def suggest_paths(pattern: str, paths: Iterable[str]) -> str:
    """Return a hint for error messages: the nearest names, or some existing names."""
    names = {part for path in paths for part in (path, path.rpartition(".")[2]) if part and not part.isdigit()}
    return (
        nearest(pattern, sorted(names))
        or f". Existing names: {', '.join(sorted(names - {p for p in names if '.' in p})[:12])}"
    )


def shortest_suffixes(chosen: Collection[str], others: Collection[str], parts: int = 1) -> list[str]:
    """Return the shortest list of suffixes with at least `parts` names each that matches `chosen` but not `others`."""
    suffixes_of_others: set[str] = set()
    for path in others:
        suffixes_of_others.update(path_suffixes(path))
    suffixes: set[str] = set()
    for path in sorted(chosen):
        for suffix in path_suffixes(path)[::-1][max(0, min(parts, path.count(".") + 1) - 1) :]:  # the shortest first
            if suffix not in suffixes_of_others:
                suffixes.add(suffix)
                break
        else:
            raise PeftcoreError(
                f"no suffix matches '{path}' without matching others. Write target_modules as a regular expression"
            )
    return sorted([suffix for suffix in suffixes if suffixes.isdisjoint(path_suffixes(suffix)[1:])])
