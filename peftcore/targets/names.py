"""Matching of module and parameter names: suffixes, exclusions, layer indices."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from peftcore.errors import PeftcoreError, nearest
from peftcore.targets.patterns import FullMatch, compiled, compiled_end


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
