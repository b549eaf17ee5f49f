"""Errors and warnings that a user can act on, and suggestions for misspelt names."""

from __future__ import annotations

import difflib
import functools
import heapq
import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

_COMPARED = 1_000  # number of names that are compared with one name, which takes 0.1 s
_LONGEST = 200  # maximum length of a name that is compared
# {name of a config field in another library: name in peftcore}
FIELD_SYNONYMS = {"rank": "r", "targets": "target_modules", "target": "target_modules"}
# {name of an argument in another library: name in peftcore}
ARGUMENT_SYNONYMS = {
    "adapter_name": "adapter",
    "adapter_names": "adapters",
    "combination_type": "how",
    "is_trainable": "trainable",
    "keep_adapters": "undo",
    "model_id": "path",
    "save_directory": "path",
    "svd_rank": "r",
    "torch_dtype": "dtype",
}

Function = TypeVar("Function", bound=Callable[..., Any])


class PeftcoreError(ValueError):
    """Invalid input or state; the message says what is wrong, what was found, and what to do."""


class PluginError(PeftcoreError):
    """A plugin cannot be used, because it is missing, broken, misspelt, or its name is taken twice."""


class CheckpointError(PeftcoreError):
    """An adapter on disk cannot be read, does not fit the model, or could not be written."""


def warn(message: str) -> None:
    """Issue a UserWarning that names the line that calls this function."""
    warnings.warn(message, UserWarning, stacklevel=2)


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """Return a hint such as ` (nearest: 'r', 'use_rslora')`, or an empty string if nothing is similar.

    Case is ignored, and anagrams of the name come first. The work is bounded, since a file may have any number of names
    of any length: among many names, only names of similar length are compared, and long names are skipped.
    """
    if len(name) > _LONGEST:
        return ""
    names = [candidate for candidate in known if len(candidate) <= _LONGEST]
    if len(names) > _COMPARED:
        names = heapq.nsmallest(_COMPARED, names, key=lambda candidate: abs(len(candidate) - len(name)))
    by_lower = {known.lower(): known for known in names}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=n, cutoff=0.5)
    close.sort(key=lambda known: sorted(known) != sorted(name.lower()))  # two letters were swapped
    return f" (nearest: {', '.join(repr(by_lower[known]) for known in close)})" if close else ""


def nearest_field(name: str, known: Iterable[str]) -> str:
    """Return a hint: the config field that `name` corresponds to in another library, or else the nearest fields.

    A prefix is ignored: `method_r` means `r`, and `alpha` the only field that ends with it, `method_alpha`.
    """
    fields = list(known)
    plain = name.partition("_")[2] if "_" in name else name
    candidates = [name, plain, FIELD_SYNONYMS.get(name), FIELD_SYNONYMS.get(plain)]
    meant = [field for field in candidates if field in fields][:1]
    meant = meant or [field for field in fields if field.endswith(f"_{name}")]
    return f". Did you mean '{meant[0]}'?" if len(meant) == 1 else nearest(name, fields)


def with_argument_hints(function: Function) -> Function:
    """Decorate a function to raise a PeftcoreError for an unknown argument, with a hint at the intended argument."""
    known = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs.keys() - known:
            synonym = ARGUMENT_SYNONYMS.get(name)
            hint = f". Did you mean '{synonym}'?" if synonym in known else f"{nearest(name, known)}."
            raise PeftcoreError(f"{function.__name__} has no argument '{name}'{hint} Its arguments: {', '.join(known)}")
        return function(*args, **kwargs)

    return cast(Function, checked)
