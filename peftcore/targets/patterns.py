"""Regular expressions for module paths, matched in bounded time: a pattern may come from a stranger's file.

Python's `re` tries one way after the other, and `([a-z.]+)+X` has 2ⁿ of them on a path of n characters. Here only a
pattern that has few ways is given to `re`. Any other is followed on all ways at once:

    positions in the path are the bits of an integer
    a node of the pattern maps the positions where it may begin to those where it may end
    the pattern matches where the end is reached from the start

which takes (nodes · length) operations on integers, and gives what `re.fullmatch` gives. References back to a group,
atomic groups and possessive repeats depend on the way that was taken; they are refused where `re` is not bounded.

A config may have thousands of patterns for a model of thousands of modules. `limited` bounds what they take together.
"""

from __future__ import annotations

import contextlib
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

from peftcore.errors import PeftcoreError

try:
    from re import _compiler, _constants, _parser  # type: ignore[attr-defined]  # private, and without stubs
except ImportError:  # Python 3.10
    import sre_compile as _compiler
    import sre_constants as _constants
    import sre_parse as _parser

_LENGTH = 100_000  # of a pattern: the names of all modules of a large model, one after the other
_WAYS = 1 << 17  # that `re` may have to try on a path of 64 characters
_STEPS = 200_000  # on one path
_STEPS_BETWEEN_CHECKS = 1_000
_SECONDS = 10.0  # of processor time for the patterns of one load; usual patterns of a large model take 0.3
_PATTERNS = 2_000  # different ones in one load
_CHARACTERS = 500_000  # of all patterns of one load: to parse them takes 3 s, and a hundred times their size
_ONE_CHARACTER = {_constants.LITERAL, _constants.NOT_LITERAL, _constants.ANY, _constants.IN}
_REPEATS = {_constants.MAX_REPEAT, _constants.MIN_REPEAT}
_ASSERTIONS = {_constants.ASSERT, _constants.ASSERT_NOT}
_SCOPED = re.IGNORECASE | re.DOTALL | re.ASCII | re.MULTILINE

FullMatch = Callable[[str], bool]


class _Budget:
    """What the patterns of one load may take together: processor time, their number and their length."""

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

    @contextlib.contextmanager
    def spending(self, pattern: str) -> Iterator[None]:
        """Count the time of the block. Raise a PeftcoreError if all blocks together took too long."""
        began = time.thread_time()
        yield
        self.seconds += time.thread_time() - began
        self.check(pattern)

    def check(self, pattern: str, since: float = 0.0) -> None:
        """Raise a PeftcoreError if the time is spent, with the `since` seconds that are not counted yet."""
        if self.seconds + since > _SECONDS:
            raise PeftcoreError(
                f"the patterns of the config take more than {_SECONDS:g} s to match, the last of them "
                f"{_short(pattern)}. Write them more simply"
            )


_BUDGET: ContextVar[_Budget | None] = ContextVar("peftcore_patterns", default=None)


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Bound the time that all patterns take together that are compiled within the block; blocks inside belong to it.

    Raises:
        PeftcoreError: in the block, where they take too long or are too many.
    """
    if _BUDGET.get() is not None:
        yield
        return
    token = _BUDGET.set(_Budget())
    try:
        yield
    finally:
        _BUDGET.reset(token)


def compiled(pattern: str, field: str) -> FullMatch:
    """Return `re.compile(pattern).fullmatch` as a yes or no, in bounded time.

    Args:
        pattern: a regular expression, which may come from a stranger's file.
        field: of the config, for messages.

    Raises:
        PeftcoreError: `pattern` is not a regular expression, or cannot be matched in bounded time.
    """
    budget = _BUDGET.get() or _Budget()
    budget.take(pattern)
    try:
        with budget.spending(pattern):
            matches = full_match(pattern)
    except PeftcoreError:
        raise
    except (re.error, RecursionError, OverflowError, ValueError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise PeftcoreError(f"{field}={_short(pattern)} is no regular expression that can be used: {what}") from None

    def counted(text: str) -> bool:
        began = time.thread_time()
        found = matches(text, budget)
        budget.seconds += time.thread_time() - began
        budget.check(pattern)
        return found

    return counted


@lru_cache(maxsize=1024)
def full_match(pattern: str) -> Callable[[str, _Budget], bool]:
    """Return whether a text matches as a whole. Raise what Python's parser of patterns raises, and ValueError."""
    if len(pattern) > _LENGTH:
        raise ValueError(f"it has {len(pattern):,} characters, at most {_LENGTH:,} are read")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of syntax that may change its meaning one day
        parsed = _parser.parse(pattern)
        if _ways(parsed) <= _WAYS:
            regex = re.compile(pattern)
            return lambda text, _: regex.fullmatch(text) is not None
    flags = parsed.state.flags
    _refuse_unknown(parsed)
    return lambda text, budget: _Search(text, parsed.state, pattern, budget).full(parsed, flags)


def _ways(items: Iterable[Any]) -> float:
    """A bound on the ways in which `re` may walk through a sequence."""
    ways = 1.0
    for op, value in items:
        if op in _REPEATS or op is getattr(_constants, "POSSESSIVE_REPEAT", None):
            least, most, inner = value
            if most > 1 and any(o not in _ONE_CHARACTER for o, _ in inner):
                return float("inf")
            ways *= min(most - least + 1, 64) * _ways(inner)
        elif op is _constants.BRANCH:
            ways *= sum(map(_ways, value[1]))
        else:
            for inner in _inside(op, value):
                ways *= _ways(inner)
    return ways


def _inside(op: Any, value: Any) -> list[Any]:
    """The sequences in a node."""
    if op is _constants.BRANCH:
        return value[1]
    if op is _constants.SUBPATTERN or op in _REPEATS:
        return [value[-1]]
    if op in _ASSERTIONS:
        return [value[1]]
    return [part for part in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(part, _SEQUENCE)]


_SEQUENCE = _parser.SubPattern


def _refuse_unknown(items: Iterable[Any]) -> None:
    known = (*_ONE_CHARACTER, *_REPEATS, *_ASSERTIONS, _constants.BRANCH, _constants.SUBPATTERN, _constants.AT)
    for op, value in items:
        if op not in known and op is not _constants.FAILURE:
            raise ValueError(f"{op} cannot be matched in bounded time in a pattern with so many ways to match")
        for inner in _inside(op, value):
            _refuse_unknown(inner)


class _Search:
    """All ways through a pattern at once, on one text."""

    def __init__(self, text: str, state: Any, pattern: str, budget: _Budget) -> None:
        self.text, self.state, self.pattern, self.budget = text, state, pattern, budget
        self.began = time.thread_time()
        self.everywhere = (1 << len(text) + 1) - 1
        self.steps = 0
        self.found: dict[tuple[Any, Any, int], int] = {}

    def full(self, items: Any, flags: int) -> bool:
        return bool(self.follow(items, 1, flags, True) >> len(self.text) & 1)

    def follow(self, items: Any, at: int, flags: int, forward: bool) -> int:
        """Where a sequence may end, for the positions `at` where it may begin; backward the other way round."""
        for op, value in items if forward else reversed(list(items)):
            self.steps += 1
            if self.steps > _STEPS:
                raise PeftcoreError(f"the pattern {_short(self.pattern)} takes too many steps. Write it more simply")
            if self.steps % _STEPS_BETWEEN_CHECKS == 0:
                self.budget.check(self.pattern, time.thread_time() - self.began)
            if not at:
                return 0
            if op in _ONE_CHARACTER:
                here = self.characters(op, value, flags)
                at = (at & here) << 1 if forward else at >> 1 & here
            elif op is _constants.BRANCH:
                ends = 0
                for inner in value[1]:
                    ends |= self.follow(inner, at, flags, forward)
                at = ends
            elif op is _constants.SUBPATTERN:
                _, added, removed, inner = value
                at = self.follow(inner, at, (flags | added) & ~removed, forward)
            elif op in _REPEATS:
                least, most, inner = value
                at = self.repeat(least, most, inner, at, flags, forward)
            elif op in _ASSERTIONS:
                direction, inner = value
                holds = self.follow(inner, self.everywhere, flags, direction < 0)
                at &= holds if op is _constants.ASSERT else ~holds
            elif op is _constants.AT:
                at &= self.anchored(op, value, flags)
            else:  # FAILURE
                return 0
        return at

    def repeat(self, least: int, most: int, inner: Any, at: int, flags: int, forward: bool) -> int:
        # Nothing goes back, so what is reached no longer changes after one step more than there are positions.
        longest = len(self.text) + 1
        for _ in range(min(least, longest)):
            before, at = at, self.follow(inner, at, flags, forward)
            if at == before:
                break
        if forward and most - least >= longest and len(inner) == 1 and inner[0][0] in _ONE_CHARACTER:
            (op, value), *_ = inner
            run = self.characters(op, value, flags)
            return ((at & run) + run ^ run) | at  # the carry of the sum runs through neighbouring bits
        reached = at
        for _ in range(min(most - least, longest)):
            at = self.follow(inner, at, flags, forward)
            if at | reached == reached:
                break
            reached |= at
        return reached

    def characters(self, op: Any, value: Any, flags: int) -> int:
        """The positions whose character a node takes."""
        key = (op, id(value) if op is _constants.IN else value, flags)
        if key not in self.found:
            if op is _constants.LITERAL and not flags & re.IGNORECASE:
                takes: Callable[[str], Any] = chr(value).__eq__
            else:
                takes = self._alone(op, value, flags).match
            self.found[key] = sum(1 << i for i, character in enumerate(self.text) if takes(character))
        return self.found[key]

    def anchored(self, op: Any, value: Any, flags: int) -> int:
        """The positions where an anchor such as `^`, `$` or `\\b` holds."""
        anchor = self._alone(op, value, flags)
        return sum(1 << i for i in range(len(self.text) + 1) if anchor.match(self.text, i))

    def _alone(self, op: Any, value: Any, flags: int) -> re.Pattern[str]:
        node = _SEQUENCE(self.state, [(op, value)])
        scoped = (None, flags & _SCOPED, _SCOPED & ~flags, node)
        return _compiler.compile(_SEQUENCE(self.state, [(_constants.SUBPATTERN, scoped)]))


def _short(pattern: str) -> str:
    return repr(pattern) if len(pattern) <= 200 else f"{pattern[:200]!r}..."
