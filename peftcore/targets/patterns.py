"""Regular expressions for module paths, matched in bounded time: a pattern may come from an untrusted file.

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
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

from peftcore.errors import PeftcoreError

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
