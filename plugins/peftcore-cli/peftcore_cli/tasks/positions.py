"""Positions of a model: some have a table of them, and a text with more tokens than the table has rows is an error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from peftcore.errors import PeftcoreError
from peftcore.plugin import number_of_positions as number_of_positions


def check(model: nn.Module, tokens: int, advice: str = "Pass --max-length {}") -> None:
    """Raise a PeftcoreError if the model has no position for each of a text's tokens.

    Args:
        model: the model.
        tokens: tokens of the longest text.
        advice: what to do, with the number of positions in the place of `{}`.
    """
    known = number_of_positions(model)
    if known is not None and tokens > known:
        raise PeftcoreError(
            f"{type(model).__name__} has positions for {known:,} tokens, found texts of up to {tokens:,}. "
            f"{advice.format(known)}"
        )


@contextlib.contextmanager
def of_answers(model: nn.Module, option: str) -> Iterator[None]:
    """Raise a PeftcoreError in place of the IndexError of an answer that goes past the model's last position.

    Args:
        model: the model.
        option: option of the longest answer.
    """
    try:
        yield
    except IndexError as error:
        known = number_of_positions(model)
        if known is None or "out of range" not in str(error):
            raise
        raise PeftcoreError(
            f"{type(model).__name__} has positions for {known:,} tokens, and a prompt with its answer has more. Reduce "
            f"{option}, or pass shorter prompts"
        ) from error
